"""What a synthetic person looks like, in names and numbers, drawn at random."""

from __future__ import annotations

import dataclasses

import numpy as np

HAIR_STYLES = ("bald", "cropped", "short", "long", "bun", "ponytail")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
CLOTHES = ("tee", "crew", "turtleneck", "hoodie")

# From fair to deep, sRGB.
_SKIN = np.array(
    [
        [0.95, 0.80, 0.73], [0.93, 0.75, 0.66], [0.89, 0.70, 0.58], [0.83, 0.63, 0.49], [0.74, 0.53, 0.39],
        [0.63, 0.43, 0.30], [0.52, 0.34, 0.24], [0.42, 0.27, 0.195], [0.345, 0.222, 0.165],
    ]
)  # fmt: skip
_HAIR = {
    "black": (0.050, 0.042, 0.040), "dark brown": (0.115, 0.075, 0.055), "brown": (0.225, 0.140, 0.090),
    "auburn": (0.330, 0.145, 0.075), "red": (0.520, 0.235, 0.100), "dark blond": (0.430, 0.315, 0.185),
    "blond": (0.680, 0.530, 0.330), "grey": (0.520, 0.515, 0.510), "white": (0.800, 0.795, 0.780),
}  # fmt: skip
_EYES = {
    "dark brown": ((0.155, 0.085, 0.050), (0.235, 0.125, 0.060)),
    "brown": ((0.270, 0.155, 0.080), (0.400, 0.230, 0.105)),
    "hazel": ((0.330, 0.290, 0.150), (0.450, 0.280, 0.120)), "green": ((0.310, 0.420, 0.290), (0.470, 0.430, 0.220)),
    "blue": ((0.300, 0.450, 0.620), (0.520, 0.620, 0.700)), "grey": ((0.440, 0.500, 0.540), (0.580, 0.600, 0.590)),
}  # fmt: skip
_CLOTH = np.array(
    [
        [0.16, 0.18, 0.22], [0.85, 0.85, 0.83], [0.20, 0.32, 0.50], [0.46, 0.14, 0.16], [0.22, 0.36, 0.27],
        [0.55, 0.55, 0.57], [0.66, 0.50, 0.30], [0.36, 0.26, 0.42], [0.08, 0.08, 0.09], [0.70, 0.42, 0.36],
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traits:
    """A person's looks. Colours are sRGB; lengths metres.

    Attributes:
      skin_tone: 0 fair to 1 deep; skin_color follows from it.
      hair_style, hair_color, beard, clothing: names; `hair_rgb`, `beard_rgb`, `clothing_rgb` their colours.
      hair_length: of a typical lock.
      curl: 0 straight to 1 curly.
      parting: where hair parts, metres to the subject's left of the middle.
      fringe: hair falls over the forehead.
      recession: metres that the hairline has moved back at the temples.
      grey: share of grey strands.
      glasses: none, thin or thick rims.
    """

    skin_tone: float
    skin_color: tuple[float, float, float]
    blush: float
    freckles: float
    lip_color: tuple[float, float, float]
    lip_strength: float
    eyes: str
    eye_color: tuple[float, float, float]
    eye_color_inner: tuple[float, float, float]
    teeth_brightness: float
    hair_style: str
    hair_color: str
    hair_rgb: tuple[float, float, float]
    hair_length: float
    curl: float
    parting: float
    fringe: bool
    recession: float
    grey: float
    brow_thickness: float
    beard: str
    beard_rgb: tuple[float, float, float]
    beard_length: float
    clothing: str
    clothing_rgb: tuple[float, float, float]
    glasses: str
    glasses_rgb: tuple[float, float, float]


def sample_traits(
    rng: np.random.Generator, hair_style: str | None = None, beard: str | None = None, glasses: str | None = None
) -> Traits:
    """Random looks that go together. A style that is given replaces the drawn one."""
    tone = float(rng.beta(1.1, 1.3))
    skin = np.array([np.interp(tone * (len(_SKIN) - 1), np.arange(len(_SKIN)), c) for c in _SKIN.T])
    skin = np.clip(skin * (1 + rng.normal(0, 0.02)) * (1 + rng.normal(0, 0.012, 3)), 0, 1)

    # Dark hair is common everywhere, fair hair only with fair skin; a few are grey.
    fair = max(0.0, 1 - 2.2 * tone)
    weights = np.array(
        [0.30 + 1.6 * tone, 0.5, 0.35 * fair + 0.10, 0.13 * fair, 0.09 * fair, 0.25 * fair, 0.22 * fair, 0.10, 0.06]
    )
    hair_name = str(rng.choice(list(_HAIR), p=weights / weights.sum()))
    hair = np.clip(np.array(_HAIR[hair_name]) * (1 + rng.normal(0, 0.06)), 0, 1)
    eye_weights = np.array([0.25 + tone, 0.3, 0.18 * fair + 0.02, 0.14 * fair, 0.30 * fair, 0.12 * fair])
    eyes = str(rng.choice(list(_EYES), p=eye_weights / eye_weights.sum()))

    styles = np.array([0.10, 0.16, 0.26, 0.24, 0.12, 0.12])
    beards = {  # Long styles go without a beard most of the time.
        "bald": [0.35, 0.25, 0.05, 0.15, 0.20], "cropped": [0.40, 0.25, 0.08, 0.12, 0.15],
        "short": [0.50, 0.18, 0.07, 0.10, 0.15], "long": [0.90, 0.03, 0.01, 0.02, 0.04],
        "bun": [0.92, 0.03, 0.0, 0.01, 0.04], "ponytail": [0.94, 0.03, 0.0, 0.01, 0.02],
    }  # fmt: skip
    drawn_style = str(rng.choice(HAIR_STYLES, p=styles))
    style = hair_style or drawn_style
    drawn_beard = str(rng.choice(BEARDS, p=beards[style]))
    beard = beard or drawn_beard
    low, high = {
        "bald": (0.0, 0.0), "cropped": (0.006, 0.014), "short": (0.026, 0.050), "long": (0.24, 0.38),
        "bun": (0.2, 0.2), "ponytail": (0.18, 0.28),
    }[style]  # fmt: skip
    draw = rng.random(12)
    curl = float(np.clip(draw[0] * 1.1 - 0.25 + 0.5 * (tone > 0.6), 0, 1))
    pale = np.array([0.62, 0.61, 0.60])
    grey = float(0.12 * max(0.0, 3 * draw[1] - 2) + (0.3 if hair_name == "grey" else 0.0))
    beard_rgb = hair * [1.08, 0.96, 0.92] + (0.25 * draw[2] if grey > 0.05 else 0.0) * (pale - hair)
    lip = np.clip(skin * [0.84, 0.60, 0.59] + draw[3] * np.array([0.05, -0.03, -0.01]), 0, 1)
    painted = style in ("long", "bun", "ponytail") and beard == "none" and draw[4] < 0.4
    if painted:
        lip = 0.45 * lip + 0.55 * np.array([0.66, 0.16, 0.20])
    drawn_glasses = "thick" if draw[5] < 0.10 else "thin" if draw[5] < 0.24 else "none"
    return Traits(
        skin_tone=tone,
        skin_color=_rgb(skin),
        blush=float(0.35 + 0.65 * draw[6]),
        freckles=float(max(0.0, rng.normal(0.0, 0.35))) if tone < 0.35 else 0.0,
        lip_color=_rgb(lip),
        lip_strength=0.95 if painted else 0.70,
        eyes=eyes,
        eye_color=_rgb(np.array(_EYES[eyes][0]) * (1 + rng.normal(0, 0.06))),
        eye_color_inner=_rgb(np.array(_EYES[eyes][1])),
        teeth_brightness=float(0.9 + 0.15 * draw[7]),
        hair_style=style,
        hair_color=hair_name,
        hair_rgb=_rgb(hair),
        hair_length=float(low + (high - low) * draw[8]),
        curl=curl if style != "bun" else 0.3 * curl,
        parting=float(rng.choice([-1, 1]) * rng.uniform(0.0, 0.026)),
        fringe=bool(style in ("short", "long") and draw[9] < 0.3),
        recession=float(0.016 * draw[10] ** 2) if style in ("bald", "cropped", "short") else 0.0,
        grey=grey,
        brow_thickness=float(0.75 + 0.5 * rng.random()),
        beard=beard,
        beard_rgb=_rgb(beard_rgb),
        beard_length=float(rng.uniform(0.010, 0.028)),
        clothing=str(rng.choice(CLOTHES)),
        clothing_rgb=_rgb(_CLOTH[rng.integers(len(_CLOTH))] * (1 + rng.normal(0, 0.08))),
        glasses=glasses or drawn_glasses,
        glasses_rgb=_rgb(
            [(0.06, 0.05, 0.05), (0.25, 0.14, 0.08), (0.55, 0.50, 0.42), (0.15, 0.16, 0.22)][int(draw[11] * 4)]
        ),
    )


def _rgb(color) -> tuple[float, float, float]:
    return tuple(float(c) for c in np.round(np.clip(color, 0.0, 1.0), 5))
