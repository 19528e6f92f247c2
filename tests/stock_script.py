"""What a stranger runs on exported folders: transformers alone, none of this package. Run by test_export_hf.py.

In: a JSON file {"folders": {name: path}, "chats": [[message, ...], ...], "marked": text, "picture": path,
"texts": [...], "new": tokens}. Out: an npz file with what each folder's processor and model make of the chats, one by
one ("NAME/N/...") and together ("NAME/all/..."); the ids of the texts ("NAME/text/N"), as messages too ("NAME/chat/N"),
and of the text that says where its picture stands ("NAME/marked"); the names that transformers would save the tensors
under ("NAME/names"); element types ("NAME/dtypes") and logits of the first chat as the folder is stored
("NAME/stored").
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor


def main(spec_path: str, out: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    arrays = {}
    for name, folder in spec["folders"].items():
        trust = {"trust_remote_code": (Path(folder) / "modeling_moextend.py").exists()}
        processor = AutoProcessor.from_pretrained(folder, backend="pil", **trust)
        load = AutoModelForImageTextToText.from_pretrained
        model, report = load(folder, dtype=torch.float32, output_loading_info=True, **trust)
        assert not any(report.values()), report
        rows = {str(n): [chat] for n, chat in enumerate(spec["chats"])} | {"all": spec["chats"]}
        for row, chats in rows.items():
            made = answers(model, processor, chats, new=spec["new"])
            arrays |= {f"{name}/{row}/{key}": value.numpy() for key, value in made.items()}
        for n, text in enumerate(spec["texts"]):
            arrays[f"{name}/text/{n}"] = np.array(processor.tokenizer(text)["input_ids"])
            chat = [{"role": "user", "content": text}]
            options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
            arrays[f"{name}/chat/{n}"] = np.array(processor.tokenizer.apply_chat_template(chat, **options)["input_ids"])
        prompt = processor.apply_chat_template([{"role": "user", "content": spec["marked"]}])
        inputs = processor(text=prompt, images=Image.open(spec["picture"]), add_special_tokens=False)
        arrays[f"{name}/marked"] = np.array(inputs["input_ids"][0])
        if trust["trust_remote_code"]:
            for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM):
                assert type(kind.from_pretrained(folder, **trust)).__name__ == type(model).__name__
        stored = load(folder, **trust)
        arrays[f"{name}/dtypes"] = np.array(sorted({str(leaf.dtype) for leaf in stored.parameters()}))
        arrays[f"{name}/stored"] = answers(stored, processor, spec["chats"][:1], new=1)["logits"].float().numpy()
        arrays[f"{name}/names"] = names_of(model)
    assert not any(module.startswith("moextend_jax") for module in sys.modules)
    np.savez(out, **arrays)


def names_of(model) -> np.ndarray:
    """Of the tensors, as transformers would save them."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        with safe_open(Path(saved) / "model.safetensors", "np") as file:
            return np.array(sorted(file.keys()))


@torch.no_grad()
def answers(model, processor, chats: list, *, new: int) -> dict[str, torch.Tensor]:
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    length = inputs["input_ids"].shape[1]
    answer, slow = (
        model.generate(**inputs, max_new_tokens=new, use_cache=cache)[:, length:] for cache in (True, False)
    )
    assert torch.equal(answer, slow), "an answer depends on the cache"
    made = {"ids": inputs["input_ids"], "mask": inputs["attention_mask"], "answer": answer}
    pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    return made | pixels | {"logits": model(**inputs).logits}


if __name__ == "__main__":
    main(*sys.argv[1:])
