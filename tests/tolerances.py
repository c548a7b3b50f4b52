"""Every tolerance of the test suite that is about numbers, with its reason."""

import torch

ATTENTION_ERROR = {
    # Products and sums in float32 on both sides; their order differs, and exp is within two units in the last place.
    torch.float32: 2e-5,
    # Keys, values and softmax weights are rounded to 11 bits before a tensor core multiplies them; scores of these
    # tests reach 18, so that a weight is off by up to 18 * 2**-12.
    torch.float16: 3.5e-3,
    # The same with 8 bits.
    torch.bfloat16: 1.5e-2,
}
"""Largest difference of an attention output, relative to its largest element, between a kernel and the definition."""

DIFFERENT_CODE_SHARE = 1e-3
"""Share of codes that may differ, by one: the mean that replaces an outlier is summed in another order, so that a
quotient that lies on the border of two codes may fall to the other side."""

DIFFERENT_CONSTANT_SHARE = 1e-2
"""Share of scales and zero points that may differ, by one unit in the last place: those of replaced rows."""

FP16_ULP = 2.0**-10
"""Largest relative distance of two neighbouring float16 numbers."""

TIED_SHARE = 1e-4
"""Constants of searched ranges, and codes, that may differ by more: sums of errors are added up in another order, and
channels of rotated values, and where two ranges leave nearly the same error, the other one is taken. The definition
with its rotation done in either way, in bfloat16, differs in 1 of 122,880 scales, by 15 %."""
