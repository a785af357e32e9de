"""Let SGLang go on with a text, without a server: python offline.py FOLDER TEXT [--tokens N]

Runs in the environment that has SGLang; needs nothing of qplug.
"""

import argparse


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("folder")
    words.add_argument("text")
    words.add_argument("--tokens", type=int, default=32)
    told = words.parse_args()

    import sglang

    engine = sglang.Engine(model_path=told.folder, mem_fraction_static=0.5)
    sampling = {"temperature": 0, "max_new_tokens": told.tokens}
    print(engine.generate(told.text, sampling)["text"])
    engine.shutdown()


if __name__ == "__main__":
    main()
