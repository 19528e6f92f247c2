"""What a stranger runs on an exported folder: transformers alone, none of this package. Run by test_export_hf.py.

In: a JSON file {"folders": {name: path}, "chats": [[message, ...], ...], "new": tokens}. Out: an npz file with what each
folder's processor and model make of the chats, one by one ("NAME/N/...") and together ("NAME/all/...").
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def main(spec_path: str, out: str) -> None:
    with open(spec_path) as file:
        spec = json.load(file)
    torch.manual_seed(0)
    arrays = {}
    for name, folder in spec["folders"].items():
        trust = {"trust_remote_code": AutoConfig_of(folder) == "moextend"}
        processor = AutoProcessor.from_pretrained(folder, backend="pil", **trust)
        load = AutoModelForImageTextToText.from_pretrained
        model, report = load(folder, dtype=torch.float32, output_loading_info=True, **trust)
        assert not any(report.values()), report
        model.eval()
        rows = {str(n): [chat] for n, chat in enumerate(spec["chats"])} | {"all": spec["chats"]}
        for row, chats in rows.items():
            inputs = processor.apply_chat_template(
                chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
                processor_kwargs={"padding": True},
            )  # fmt: skip
            with torch.no_grad():
                logits = model(**inputs).logits
                answer = model.generate(**inputs, max_new_tokens=spec["new"])[:, inputs["input_ids"].shape[1] :]
                slow = model.generate(**inputs, max_new_tokens=spec["new"], use_cache=False)
            assert torch.equal(slow[:, inputs["input_ids"].shape[1] :], answer), "with and without a cache"
            made = {"ids": inputs["input_ids"], "mask": inputs["attention_mask"], "logits": logits, "answer": answer}
            if "pixel_values" in inputs:
                made["pixels"] = inputs["pixel_values"]
            arrays |= {f"{name}/{row}/{key}": value.numpy() for key, value in made.items()}
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        for n, text in enumerate(spec["texts"]):
            arrays[f"{name}/text{n}"] = np.array(tokenizer(text)["input_ids"])
        arrays[f"{name}/saved"] = np.array(saved_names(model))
    np.savez(out, **arrays)


def AutoConfig_of(folder: str) -> str:
    with open(f"{folder}/config.json") as file:
        return json.load(file)["model_type"]


def saved_names(model) -> list[str]:
    return []


if __name__ == "__main__":
    main(*sys.argv[1:])
