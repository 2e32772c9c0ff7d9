"""What transformers computes for tiny models of many families, and how it names their tensors.

Made once, with torch 2.14 and transformers 5.24 (the extra `oracle`) on a CPU, f32, eager
attention; no test needs them.

    PYTHONPATH=tests/support python tests/oracle/transformers_families.py

replaces `families.npz`: logits by the name of a case of `tests/support/hf_families.py`,
`(positions, vocab)`, at its `SEEN`; and, as JSON under "shapes", the tensors that transformers
saves of a model with that configuration, those of other parts than the text model left out.
"""

import json
import pathlib
import tempfile

import hf_families as families
import numpy as np
import torch
import transformers
from safetensors import safe_open
from tiny_models import write_folder

OTHER_PARTS = ("visual", "vision", "audio", "multi_modal_projector")


def main() -> None:
    """Write the file."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shapes, logits = {}, {}
    for name, config in families.CASES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            shapes[name] = saved_shapes(folder / "saved", config)
            tensors = families.draw(name, shapes[name])
            write_folder(folder / "drawn", config, tensors=tensors, tokenizer=False)
            logits[name] = computed(folder / "drawn", config)[list(families.SEEN)]
    np.savez_compressed(families.ORACLE_FILE, shapes=json.dumps(shapes), **logits)


def auto_class(config: families.Config) -> type:
    """Which of transformers' classes opens it."""
    if "text_config" in config:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def is_of_text(name: str) -> bool:
    """Whether a tensor is of the text model."""
    return not any(part in name for part in OTHER_PARTS)


def saved_shapes(folder: pathlib.Path, config: families.Config) -> families.Shapes:
    """Of the tensors that transformers saves."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(folder)
    auto_class(config).from_config(read, dtype=torch.float32).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        names = filter(is_of_text, file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def computed(folder: pathlib.Path, config: families.Config) -> np.ndarray:
    """Logits `(tokens, vocab)` of one forward pass over the whole text, without a cache."""
    model, loading = auto_class(config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    lost = {kind: [n for n in names if is_of_text(str(n))] for kind, names in loading.items()}
    assert not any(lost.values()), lost
    with torch.no_grad():
        out = model.eval()(torch.tensor([families.text_ids()]), use_cache=False).logits[0]
    return out.numpy().astype(np.float32)


if __name__ == "__main__":
    main()
