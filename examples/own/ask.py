"""Asks a folder that `moextend export WORKDIR FOLDER --layout hf` wrote, with transformers and torch alone.

python ask.py FOLDER PICTURE QUESTION
"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(talk, add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt", add_special_tokens=False)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip())
