"""A processor is fast in bfloat16 where its maker's units for it are faster than those for float32."""

from __future__ import annotations

import pytest

from flowrl.processor import bfloat16_of

DESCRIBED = "processor\t: {core}\nvendor_id\t: {maker}\nmodel name\t: X\nflags\t\t: fpu {flags}\nbugs\t\t: y\n\n"


@pytest.mark.parametrize(
    ("maker", "flags", "found"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", "fast"),
        ("AuthenticAMD", "avx2 avx512f", "none"),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", "fast"),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", "slow"),
        ("GenuineIntel", "avx2", "none"),
    ],
)
def test_makers_differ(maker, flags, found):
    assert bfloat16_of("".join(DESCRIBED.format(core=k, maker=maker, flags=flags) for k in range(2))) == found


def test_arms_words_and_no_words_are_none():
    assert bfloat16_of("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n") == "none"
    assert bfloat16_of("") == "none"
