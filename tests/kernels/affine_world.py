"""A small affine cache for kernel tests: its options, its state, and a history of calls with the definition."""

from dataclasses import dataclass, field

import torch

from ottfx import affine_cache
from ottfx.reference import words_per_page
from ottfx.rotation import rotate

PAGE = 128
SITE = 1
POOL = ("outlier_key", "outlier_position", "outlier_value")
SEATS = ("seat_key", "seat_key_scale", "seat_row", "seat_value", "seat_value_scale")
READ_BY_ATTEND = (
    "key_codes", "key_scale", "key_zero_point", "key_residual",
    "value_codes", "value_scale", "value_zero_point", "value_residual", *POOL, *SEATS, "key_order",
    "key_residual_scale", "value_residual_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    scheme: str = "ott"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    key_bits: int = 2
    value_bits: int = 2
    group_size: int = 32
    value_group_size: int | None = None
    residual_length: int = 32
    capacity: int = 3
    spill: int = 8
    seats: int = 0
    score_norm: int = 1
    replacement: str = "rest"
    mask_replaced: bool = True
    mixed: bool = False
    range_search: bool = False
    symmetric: bool = False
    coded_window: bool = False
    rotated: bool = False
    pages: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k)]
        return "-".join(changed).replace("torch.", "") or "default"

    def ring(self):
        return self.residual_length + (self.group_size if self.scheme == "ott" else 0)

    def schedule(self):
        if self.scheme == "ott":
            return (self.residual_length, self.group_size) * 2
        return 0, self.residual_length, self.residual_length, 1

    def pool_seats(self):
        return self.capacity if self.scheme == "ott" and not self.seats else 0

    def read_options(self):
        absent = {"value_zero_point": None} if self.symmetric else {}
        return absent | {"key_bits": self.key_bits, "value_bits": self.value_bits}

    def append_options(self):
        names = ("key_window", "key_step", "value_window", "value_step")
        return dict(
            zip(names, self.schedule(), strict=True), **self.read_options(), range_search=self.range_search,
            group_size=self.group_size, outlier_capacity=self.pool_seats(),
            score_norm=self.score_norm, replacement=self.replacement, mask_replaced=self.mask_replaced,
        )  # fmt: skip

    def new_state(self):
        lead = (self.batch, self.kv_heads)
        state = {}
        value_groups = self.head_dim // (self.value_group_size or self.head_dim)
        constants = {"key": (PAGE // self.group_size, self.head_dim), "value": (value_groups, PAGE)}
        for role, bits in (("key", self.key_bits), ("value", self.value_bits)):
            words = words_per_page(PAGE, self.head_dim, bits)
            state[f"{role}_codes"] = torch.zeros(*lead, self.pages, words, dtype=torch.int32)
            for name in ("scale", "zero_point"):
                state[f"{role}_{name}"] = torch.zeros(*lead, self.pages, *constants[role], dtype=torch.float16)
            kept_in = torch.int8 if self.coded_window else self.dtype
            state[f"{role}_residual"] = torch.zeros(*lead, self.ring(), self.head_dim, dtype=kept_in)
            if self.coded_window:
                state[f"{role}_residual_scale"] = torch.zeros(*lead, self.ring(), dtype=torch.float16)
        if self.symmetric:
            del state["value_zero_point"]
        if self.mixed:
            state["key_order"] = torch.full((*lead, self.head_dim), -1, dtype=torch.int16)
        state["residual_valid"] = torch.zeros(self.batch, self.ring(), dtype=torch.uint8)
        if self.scheme == "ott":
            rows = (*lead, self.capacity + self.spill if self.pool_seats() else 0)
            for role in ("key", "value"):
                state[f"outlier_{role}"] = torch.zeros(*rows, self.head_dim, dtype=self.dtype)
            for name in ("outlier_position", "value_outlier_position"):
                state[name] = torch.full(rows, -1, dtype=torch.int32)
            state["spill_count"] = torch.zeros(lead, dtype=torch.int32)
        if self.seats:
            rows = (*lead, self.pages, self.seats * PAGE // self.group_size)
            for role, row in (("key", "seat_row"), ("value", "value_seat_row")):
                state[f"seat_{role}"] = torch.zeros(*rows, self.head_dim, dtype=torch.int8)
                state[f"seat_{role}_scale"] = torch.zeros(rows, dtype=torch.float16)
                state[row] = torch.full(rows, -1, dtype=torch.int8)
        return state


@dataclass
class World:
    """One cache and its lengths. `draw` makes new tokens; `append` stores them with the plain-torch definition."""

    case: Case
    state: dict = field(init=False)
    lengths: list = field(default_factory=lambda: [0, 0, 0])

    def __post_init__(self):
        self.state = self.case.new_state()
        self.generator = torch.Generator().manual_seed(7)

    def draw(self, q_len, padded=False):
        case = self.case
        # [batch, q_len, heads, head_dim] as projections leave it, seen as [batch, heads, q_len, head_dim].
        key, value = torch.randn(2, case.batch, q_len, case.kv_heads, case.head_dim, generator=self.generator)
        if case.mixed:
            # Heads of both sets of widths: in every other one, a quarter of the channels is six times as wide.
            steep = (torch.arange(case.batch)[:, None] + torch.arange(case.kv_heads)) % 2 == 0
            wide = torch.where(torch.arange(case.head_dim) < case.head_dim // 4, 2.0, 1 / 3)
            key *= torch.where(steep[:, None, :, None], wide, 1.0)
        key[..., 3] += 8.0
        key[:, q_len // 2] *= 0.05
        valid = torch.rand(case.batch, q_len, generator=self.generator) > 0.3 if padded else None
        if padded == "left":
            valid = torch.arange(q_len) >= torch.tensor([[q_len // 3], [0], [q_len // 2]])[: case.batch]
        return key.transpose(1, 2).to(case.dtype), value.transpose(1, 2).to(case.dtype), valid

    def draw_query(self, q_len):
        case = self.case
        query = torch.randn(case.batch, q_len, case.heads, case.head_dim, generator=self.generator)
        return query.transpose(1, 2).to(case.dtype)

    def lengths_tensor(self):
        return torch.tensor([[9, 9, 9], self.lengths])

    def append(self, key, value, valid):
        value = rotate(value) if self.case.rotated else value
        affine_cache.append(key, value, valid, self.lengths_tensor(), SITE, **self.state, **self.case.append_options())
        past = self.lengths[0] + key.shape[2]
        schedule = self.case.schedule()
        ends = [(past - schedule[2 * half]) // schedule[2 * half + 1] * schedule[2 * half + 1] for half in (0, 1)]
        self.lengths = [past, max(self.lengths[1], ends[0]), max(self.lengths[2], ends[1])]

    def run(self, steps, padded=False):
        for q_len in steps:
            self.append(*self.draw(q_len, padded))

    def read_state(self):
        return {name: tensor for name, tensor in self.state.items() if name in READ_BY_ATTEND}
