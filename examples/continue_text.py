"""Let models go on with a sentence: python continue_text.py MODEL [MODEL ...]"""

import sys

import torch

import qplug

PROMPT = "The standard library of Python has a module"


def continue_text(model_name: str, prompt: str, tokens: int = 40) -> str:
    """``prompt`` and what ``model_name`` (a folder, or qplug:demo) makes of it, word by word."""
    tokenizer = qplug.load_tokenizer(model_name)
    model = qplug.load(model_name)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    with torch.inference_mode():
        for _ in range(tokens):
            following = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return str(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"--- {name}\n{continue_text(name, PROMPT)}\n")
