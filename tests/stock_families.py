"""What a stranger makes of exported folders of ids and pixels: transformers alone. Run by test_export_families.py.

In: an npz file with ids_BL and pixel_values, for folders that hear with heard_BL and input_features too, and folders.
Out: an npz file with each folder's logits ("NAME/logits"), greedy tokens behind the rows ("NAME/answer"), the names of
tensors that transformers would save ("NAME/names"), and the logits as the folder is loaded in bfloat16 ("NAME/half").
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from stock_script import names_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


@torch.no_grad()
def main(inputs: str, out: str, *folders: str) -> None:
    given, arrays = np.load(inputs), {}
    pixels, sounds = torch.tensor(given["pixel_values"]), torch.tensor(given["input_features"])
    for folder in map(Path, folders):
        sees, hears = (part in (folder / "config.json").read_text() for part in ("vision_config", "audio_config"))
        ids = torch.tensor(given["heard_BL" if hears else "ids_BL"])
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        options = {"trust_remote_code": True} if (folder / "modeling_moextend.py").exists() else {}
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        assert not any(report.values()), report
        seen = {"pixel_values": pixels} if sees else {}
        seen |= {"input_features": sounds} if hears else {}
        made = {"logits": model(input_ids=ids, **seen).logits}
        made["answer"] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, **seen)[:, ids.shape[1] :]
        half = kind.from_pretrained(folder, dtype=torch.bfloat16, **options)
        rounded = {name: value.bfloat16() for name, value in seen.items()}
        made["half"] = half(input_ids=ids, **rounded).logits.float()
        arrays |= {f"{folder.name}/{key}": value.numpy() for key, value in made.items()}
        arrays[f"{folder.name}/names"] = names_of(model)
        if options:
            padded = {"input_ids": F.pad(ids, (3, 0)), "attention_mask": F.pad(torch.ones_like(ids), (3, 0))}
            there = model.generate(**padded, **seen, max_new_tokens=4, do_sample=False)
            assert (there[:, -4:] == made["answer"]).all()
            # Weights that are brought when a module is called, as device_map="auto" does on a small GPU.
            embeds, brought = model.get_input_embeddings()(ids), cpu_offload(model, execution_device="cpu")
            for tokens in ({"input_ids": ids}, {"inputs_embeds": embeds}):
                assert (brought(**tokens, **seen).logits == made["logits"]).all()
    assert not any(module.startswith("moextend_jax") for module in sys.modules)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
