"""What a stranger makes of exported folders that hear: transformers alone. Run by test_export_sounds.py.

In: a JSON file {"folders": {name: path}, "chats": {name: [[message, ...], ...]}, "marked": text, "new": tokens}. Out:
an npz file with what each folder's processor and model make of its chats, one by one ("NAME/N/...") and together
("NAME/all/..."), the ids of the text that says where its sound of 0.15 seconds stands ("NAME/marked"), the names that
transformers would save the tensors under ("NAME/names"), and the logits of all chats as the folder is loaded in
bfloat16 ("NAME/half").
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import cpu_offload
from stock_script import names_of
from transformers import AutoModelForMultimodalLM, AutoProcessor


@torch.no_grad()
def main(spec_path: str, out: str) -> None:
    spec, arrays, load = json.loads(Path(spec_path).read_text()), {}, AutoModelForMultimodalLM.from_pretrained
    for name, folder in spec["folders"].items():
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=True)
        model, report = load(folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values()), report
        assert "audio" in model.input_modalities
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": spec["marked"]}], add_generation_prompt=True
        )
        marked = processor(text=prompt, audio=[np.zeros(2400, np.float32)], add_special_tokens=False)
        arrays[f"{name}/marked"] = np.array(marked["input_ids"][0])
        try:
            processor(text=prompt, audio=[np.zeros(16001, np.float32)])
            raise AssertionError("a sound that is too long was cut")
        except ValueError as error:
            assert "1.00 seconds, more than the 1 that are heard" in str(error)
        chats = spec["chats"][name]
        for row, chosen in {**{str(n): [chat] for n, chat in enumerate(chats)}, "all": chats}.items():
            inputs = processor.apply_chat_template(
                chosen, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True},
            )  # fmt: skip
            answer, made = model.generate(**inputs, max_new_tokens=spec["new"]), dict(inputs)
            if row == "all":
                slow = model.generate(**inputs, max_new_tokens=spec["new"], use_cache=False)
                assert torch.equal(answer, slow), "an answer depends on the cache"
                ids, more = model._expand_inputs_for_generation(2, **inputs)  # as beams do
                torch.testing.assert_close(
                    model(input_ids=ids, **more).logits, model(**inputs).logits.repeat_interleave(2, dim=0)
                )
            answer = answer[:, inputs["input_ids"].shape[1] :]
            made |= {"answer": answer, "logits": model(**inputs).logits}
            arrays |= {f"{name}/{row}/{key}": value.numpy() for key, value in made.items()}
        # Embeddings in the place of ids, and weights that are brought when a module is called.
        embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "input_ids": None}
        brought = cpu_offload(model, execution_device="cpu")
        for given in (inputs, embeds):
            assert torch.equal(brought(**given).logits, made["logits"])
        arrays[f"{name}/names"] = names_of(load(folder, trust_remote_code=True))
        half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
        arrays[f"{name}/half"] = (
            load(folder, dtype=torch.bfloat16, trust_remote_code=True)(**half).logits.float().numpy()
        )
    assert not any(module.startswith("moextend_jax") for module in sys.modules)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
