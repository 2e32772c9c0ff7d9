"""What transformers computes for the configurations of `tests/support/published_models.py`.

Made once, with torch 2.13 and transformers 5.24 on a CPU, f32, eager attention; neither is needed
to run the tests. Two steps, for these packages may live in an environment of their own:

    PYTHONPATH=tests/support python tests/oracle/transformers_logits.py write FOLDER
    python-with-torch tests/oracle/transformers_logits.py compute FOLDER

The first writes the small models, the second replaces `published.npz`: logits by name,
`(positions, vocab)`, at `SEEN`. OpenELM's code is not in transformers; it is compared with mlx-lm.
"""

import json
import pathlib
import sys

import numpy as np


def write(root: pathlib.Path) -> None:
    """One folder for each model, and what is asked of it."""
    import published_models as published

    for index, name in enumerate(published.NAMES):
        published.write_small(root / str(index), name)
    asked = {"names": published.NAMES, "ids": published.text_ids(), "seen": published.SEEN}
    (root / "asked.json").write_text(json.dumps(asked))


def compute(root: pathlib.Path) -> None:
    """Logits of one forward pass over the whole text, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = json.loads((root / "asked.json").read_text())
    logits = {}
    for index, name in enumerate(asked["names"]):
        folder = root / str(index)
        if json.loads((folder / "config.json").read_text())["model_type"] == "openelm":
            continue
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            out = model(torch.tensor([asked["ids"]]), use_cache=False).logits[0]
        logits[name] = out[asked["seen"]].numpy().astype(np.float32)
    np.savez_compressed(pathlib.Path(__file__).with_name("published.npz"), **logits)


if __name__ == "__main__":
    {"write": write, "compute": compute}[sys.argv[1]](pathlib.Path(sys.argv[2]))
