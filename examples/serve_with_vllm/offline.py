"""Let vLLM go on with a text, without a server: python offline.py FOLDER TEXT [--tokens N]

Runs in the environment that has vLLM; needs nothing of qplug.
"""

import argparse


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("folder")
    words.add_argument("text")
    words.add_argument("--tokens", type=int, default=32)
    told = words.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(told.folder, enforce_eager=True, max_model_len=512)
    sampling = SamplingParams(temperature=0, max_tokens=told.tokens)
    (answer,) = llm.generate([told.text], sampling, use_tqdm=False)
    print(answer.outputs[0].text)


if __name__ == "__main__":
    main()
