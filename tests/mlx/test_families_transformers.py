"""Logits of every family against transformers', from folders laid out as transformers saves them.

`test_families_oracle` has mlx-lm's names and shapes, and what mlx-lm does not do cannot be seen
there: windows of Gemma 2 and Phi, YaRN that is not truncated, experts in one tensor.
"""

import numpy as np
import pytest
from hf_families import CASES, NUM_TOKENS, SEEN, oracle_logits, text_ids, write_hf_family
from stepping import CPU_PROFILE, FUSED_PROFILE, Stepper

from edgekv.models.open_model import open_decoder

ATOL = 1e-4
PROFILES = {"composed": CPU_PROFILE, "fused": FUSED_PROFILE}


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name, tmp_path):
    folder, expected = write_hf_family(tmp_path, name), oracle_logits(name)
    assert expected.std() > 0.5, "logits that say something"
    for mode, profile in PROFILES.items():
        stepper = Stepper(open_decoder(folder, profile))
        for chunks in ((), (20, 1, 17)):
            logits = stepper.logits(text_ids(), chunks=chunks)
            assert len(logits) == NUM_TOKENS
            np.testing.assert_allclose(
                logits[list(SEEN)], expected, rtol=0, atol=ATOL, err_msg=mode
            )
