"""The embedded data set: rendered pedestrians and vehicles seen by several cameras.

Every picture is ray-cast from a small 3-D model, so a camera's viewpoint is a true
one. A body is a set of tapered elliptic capsules (a quadric with two end spheres),
open cones and convex blocks; textures follow from the place on the body. Three
independent sources decide a picture:

* the **identity**: build, skin, hair, clothes with their patterns, bags (or type,
  paint, decals, roof load and wheels of a vehicle);
* the **camera**: viewing angle, light, background, and what the sensor does to
  colours and sharpness. One number, `strength`, scales how far cameras differ;
* the **nuisance**: pose, heading, place, framing, passers-by and occluders.

The random numbers of a picture are seeded by (seed, split, identity, camera, frame)
alone, so a part of the set rendered anywhere equals the same part of the whole.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from PIL import Image
from scipy.ndimage import gaussian_filter

from o2cap.config import SyntheticConfig
from o2cap.data.images import ImageSet, ReIDDataset
from o2cap.errors import InputError
from o2cap.files import cache_folder

# ---------------------------------------------------------------------- the knobs
# What may differ between cameras: the middle value, and how far the outermost
# cameras stand from it at strength 1. Over the cameras of a data set each axis takes
# evenly spaced values in an order of its own, so every seed has the same total gap.
CAMERA_AXES: dict[str, tuple[float, float]] = {
    "red": (0.0, 0.10),  # log gain of the red channel
    "green": (0.0, 0.05),  # log gain
    "blue": (0.0, 0.10),  # log gain
    "exposure": (0.0, 0.11),  # log gain of all channels
    "gamma": (0.0, 0.14),  # log exponent of the tone curve
    "saturation": (-0.05, 0.25),  # log factor
    "haze": (0.05, 0.05),  # share of grey veil
    "blur": (0.40, 0.30),  # standard deviation in pixels of a picture 64 high
    "rows": (4.8, 0.6),  # log of the height in pixels at which the camera saw it
    "noise": (0.016, 0.012),  # standard deviation, on a scale of 0..1
    "jpeg": (82.0, 12.0),  # quality
    "azimuth": (0.0, 54.0),  # degrees: mean heading of what passes
    "elevation": (13.0, 9.0),  # degrees: how steeply the camera looks down
    "sun_azimuth": (-30.0, 90.0),  # degrees from the line of sight
    "sun_elevation": (50.0, 15.0),  # degrees
    "sun": (0.60, 0.20),  # share of the light that has a direction
    "occlusion": (0.12, 0.10),  # probability of an occluder
    "ground": (0.40, 0.14),  # lightness of the ground
    "wall": (0.45, 0.18),  # lightness of the wall
}
VEHICLE_ELEVATION = 12.0  # degrees by which traffic cameras look down more steeply
HEADING = 25.0  # degrees: spread of the headings within a camera
SCENERY = 0.42  # how far colours of walls and grounds depart from middle grey
TURNED = 0.12  # probability of heading the other way
PASSER_BY = 0.08  # probability that somebody else stands partly in the picture


# ------------------------------------------------------------- the compiled kernel
# Columns of a paint row, which says how one primitive is coloured.
PATTERN, C0, C1, C2, C3 = 0, 1, 4, 7, 10  # a kind, then four linear RGB colours
FREQUENCY, RATIO = 13, 14  # of the pattern
MARK, MARK_X, MARK_Z, MARK_H = 15, 16, 17, 18  # panel or print: half width, z, half h
STRAP, ROUGH, GLOSS = 19, 20, 21
# Bodywork and windows of vehicles read these, in metres:
HALF, AXLE_F, AXLE_R, WHEEL = 13, 14, 15, 16
DECAL, DECAL_Z, LAMP_Z, WINDOW_0, WINDOW_1 = 17, 18, 19, 22, 23
COLUMNS = 24
PLAIN, HOOPS, BARS, CHECK, BLOCKS, BLOTCHES, FACE, RIM, BODYWORK, CABIN = range(10)
NO_MARK, PANEL, PRINT_FRONT, PRINT_BACK, PRINT_BOTH, CUT = range(6)
CAPSULE, CONE, BLOCK = range(3)
PLANES = 10  # at most, of a block

_jit: Any = partial(njit, cache=True, error_model="numpy")


@_jit()
def _hash(i: int, j: int, k: int) -> float:
    h = (i * 374761393 + j * 668265263 + k * 974634727) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 461845907) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65535.0


@_jit()
def _noise(x: float, y: float, k: int) -> float:
    """Smooth value noise, 0..1."""
    i, j = math.floor(x), math.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = int(i), int(j)
    low = _hash(i, j, k) * (1 - u) + _hash(i + 1, j, k) * u
    high = _hash(i, j + 1, k) * (1 - u) + _hash(i + 1, j + 1, k) * u
    return low * (1 - v) + high * v


@_jit()
def _person_paint(p: Any, x: float, y: float, z: float) -> tuple[int, float]:
    """Return the colour column of paint row `p` at a place, and a brightness."""
    kind, mark = int(p[PATTERN]), int(p[MARK])
    if kind == FACE:
        if y > 0.02:
            if abs(z - 0.030) < 0.004 and abs(abs(x) - 0.018) < 0.007:
                return C3, 1.0  # eyes
            if abs(z - 0.041) < 0.003 and abs(abs(x) - 0.018) < 0.011:
                return C1, 1.0  # brows
            if abs(z + 0.010) < 0.0045 and abs(x) < 0.014:
                return C2, 1.0  # mouth
        return (C1 if mark > 0 and z < 0.002 and y > 0 else C0), 1.0  # beard
    turn = math.atan2(x, y) / (2 * math.pi)
    if kind == RIM:
        r, spokes = math.hypot(x, y) / p[WHEEL], math.cos(turn * 6.2832 * p[FREQUENCY])
        return (C0 if r > 0.68 else C1), 0.4 if spokes > 0.4 and 0.2 < r < 0.6 else 1.0
    shade = 1.0
    if p[ROUGH] > 0:  # folds across the limbs, and grain
        shade += p[ROUGH] * (_noise(turn * 9 + 40, z * 26 + x * 12, 3) - 0.5)
        shade += p[ROUGH] * 0.5 * (_noise(turn * 40 + 90, z * 90, 5) - 0.5)
    across = p[STRAP] == 1 and abs(x * 0.8 + (z - 0.68) * 0.6) < 0.011
    if across or (p[STRAP] == 2 and y > 0 and abs(abs(x) - 0.052) < 0.012):
        return C3, shade  # straps of a bag and of a backpack
    if mark == CUT and z > p[MARK_Z]:
        return C2, 1.0
    if mark == PANEL and y > 0 and abs(x) < p[MARK_X] + 0.15 * max(0.0, z - 0.70):
        return C2, shade
    shown = mark == PRINT_BOTH or mark == (PRINT_FRONT if y > 0 else PRINT_BACK)
    if shown and abs(x) < p[MARK_X] and abs(z - p[MARK_Z]) < p[MARK_H]:
        return C2, shade
    f, ratio, second = p[FREQUENCY], p[RATIO], False
    around, along = (turn * round(f * 0.5)) % 1.0 < ratio, (z * f) % 1.0 < ratio
    if kind == HOOPS:
        second = along
    elif kind == BARS:
        second = around
    elif kind == CHECK:
        second = around or along
        shade *= 0.8 if around and along else 1.0
    elif kind == BLOCKS:
        second = z > ratio
    elif kind == BLOTCHES:
        second = _noise(turn * f * 0.5 + 7, z * f, int(f * 10)) > ratio
    return (C1 if second else C0), shade


@_jit()
def _car_paint(
    p: Any, x: float, y: float, z: float, nx: float, ny: float
) -> tuple[int, float]:
    """As `_person_paint`; the normal tells sides, front and rear. −1 white, −2 red."""
    side, decal, half = abs(nx) > 0.75, int(p[DECAL]), p[HALF]
    glass = p[WINDOW_0] < z < p[WINDOW_1]
    if int(p[PATTERN]) == CABIN:
        if side:  # pillars
            glass = glass and min(abs(y - p[AXLE_F]), abs(y - p[AXLE_R])) > 0.05
        else:
            glass = glass and abs(x) < half - 0.1 - 0.25 * (z - p[WINDOW_0])
        return (C3 if glass else C0), 1.0
    if side:
        for axle in (p[AXLE_F], p[AXLE_R]):
            if math.hypot(y - axle, z - p[WHEEL]) < 1.2 * p[WHEEL]:
                return C2, 0.4  # the arch above a wheel
            if p[LAMP_Z] > 0 and abs(abs(y - 0.5 * (p[AXLE_F] - 1)) - 0.5) < 0.016:
                return C0, 0.45  # doors
        if glass:
            return (C3 if abs((y / 1.35) % 1.0 - 0.5) < 0.44 else C0), 1.0
        low, slant = z - p[DECAL_Z], z - p[DECAL_Z] - 0.3 * (y + 0.3)
        if (
            (decal == 1 and abs(low) < 0.09)
            or (decal == 2 and low < 0)
            or (decal == 3 and math.hypot(y * 0.6, low) < 0.22)
            or (decal == 4 and abs(slant) < 0.22)
        ):
            return C1, 1.0
    elif abs(ny) > 0.4 and p[LAMP_Z] > 0:
        low = abs(z - p[LAMP_Z])
        if low < 0.11 and 0.58 * half < abs(x) < 0.96 * half:
            return (-1 if ny > 0 else -2), 1.0
        if abs(x) < 0.26 and abs(z - 0.46) < 0.07:
            return -1, 0.8  # a number plate without a number
        if (ny > 0 and low < 0.11 and abs(x) < 0.5 * half) or z < 0.40:
            return C2, 0.6  # grille, bumper
        if glass:
            return (C3 if abs(x) < 0.9 * half else C0), 1.0
    elif decal == 5 and 0.08 < abs(x) < 0.30:
        return C1, 1.0  # two stripes along bonnet and roof
    return C0, 0.6 if z < 0.36 else 1.0


@_jit()
def _surface(s: Any, u: float, v: float) -> tuple[float, float, float]:
    """Return the colour of a wall (v up) or ground (v away), see `_SURFACES`."""
    grain = 1 + s[6] * (_noise(u * s[7] + 50, v * s[7] + 50, 11) - 0.5)
    grain += 0.12 * (_noise(u * 0.9 + 9, v * 0.9 + 9, 12) - 0.5)
    row = math.floor(v / s[1])
    column = u / s[0] + s[2] * (row % 2)
    cell = math.floor(column)
    second = (v / s[1] - row) * s[1] < s[3] or (column - cell) * s[0] < s[3]
    grain *= 1 + s[4] * (_hash(int(cell), int(row), 5) - 0.5)
    second = second or (s[5] > 0 and (cell + row) % 2 == 0) or s[8] < v < s[9]
    o = 13 if second else 10
    return s[o] * grain, s[o + 1] * grain, s[o + 2] * grain


@_jit()
def _apply(m: Any, x: float, y: float, z: float, one: float) -> Any:
    return (
        m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3] * one,
        m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3] * one,
        m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3] * one,
    )


@_jit()
def _block_hit(planes: Any, e: Any, d: Any, limit: float) -> float:
    enter, leave = 0.0, limit
    for j in range(PLANES):
        q = planes[j]
        speed = q[0] * d[0] + q[1] * d[1] + q[2] * d[2]
        gap = q[0] * e[0] + q[1] * e[1] + q[2] * e[2] - q[3]
        if speed < -1e-12:
            enter = max(enter, -gap / speed)
        elif speed > 1e-12:
            leave = min(leave, -gap / speed)
        elif gap > 0:
            return limit
    return enter if 0 < enter < leave else limit


@_jit()
def _round_hit(shape: Any, o: Any, d: Any, ez: float, dz: float, limit: float) -> float:
    """Nearest hit of a capsule or cone in its own axes; `ez`, `dz` in the scene's."""
    ra, rb, h = shape[0], shape[1], shape[2]
    slope = (rb - ra) / h
    start = ra + slope * o[2]
    ring = d[0] * d[0] + d[1] * d[1]
    a = ring - slope * slope * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] * o[0] + o[1] * o[1]
    bb = b - slope * d[2] * start
    disc = bb * bb - a * (c - start * start)
    found = limit
    if disc > 0 and a > 1e-12:
        t = (-bb - math.sqrt(disc)) / a
        if 0 <= o[2] + t * d[2] <= h and 0 < t < found and ez + t * dz < shape[4]:
            found = t
    for end in range(2):
        r, z = (rb, o[2] - h) if end else (ra, o[2])
        t = -1.0
        if shape[3] == CONE:
            if abs(d[2]) > 1e-12 and c - z / d[2] * (2 * b - z / d[2] * ring) < r * r:
                t = -z / d[2]
        else:
            a, bb = ring + d[2] * d[2], b + z * d[2]
            disc = bb * bb - a * (c + z * z - r * r)
            if disc > 0:
                t = (-bb - math.sqrt(disc)) / a
        if 0 < t < found and ez + t * dz < shape[4]:
            found = t
    return found


@_jit()
def _normal(m: Any, shape: Any, planes: Any, x: float, y: float, z: float) -> Any:
    if shape[3] == BLOCK:
        near, best = -1e9, 0
        for j in range(PLANES):
            gap = planes[j, 0] * x + planes[j, 1] * y + planes[j, 2] * z - planes[j, 3]
            if gap > near:
                near, best = gap, j
        return planes[best, 0], planes[best, 1], planes[best, 2]
    px, py, pz = _apply(m, x, y, z, 1.0)
    ra, rb, h = shape[0], shape[1], shape[2]
    if shape[3] == CONE and (pz < 1e-6 or pz > h - 1e-6):
        px, py, pz = 0.0, 0.0, pz - 0.5 * h
    elif pz > h:
        pz -= h
    elif pz >= 0:
        pz = -(rb - ra) / h * (ra + (rb - ra) / h * pz)
    nx = m[0, 0] * px + m[1, 0] * py + m[2, 0] * pz
    ny = m[0, 1] * px + m[1, 1] * py + m[2, 1] * pz
    nz = m[0, 2] * px + m[1, 2] * py + m[2, 2] * pz
    norm = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12
    return nx / norm, ny / norm, nz / norm


@_jit()
def _cast(
    local: Any, texture: Any, shape: Any, planes: Any, paints: Any, boxes: Any,
    view: Any, window: Any, light: Any, place: Any, scene: Any, k: int, out: Any,
) -> None:  # fmt: skip
    """Ray-cast one picture into `out` [h, w, 3], linear light, k × k rays a pixel.

    `local` and `texture` [n, 3, 4] take a place to a primitive's own axes and to its
    texture; `shape` [n, 5] holds radii, length, kind and the height above which
    nothing shows; `planes` [n, PLANES, 4]; `boxes` [n, 4] the rays among which it can
    appear (only there is it tried); `view` [3, 4] takes image plane coordinates
    (right, up, forward) to a direction, and its last column is the eye; `window` the
    picture's edges on the image plane; `light` direction, share, colours of sun and
    sky; `place` the frame of ground and wall and the shape of the shadow; `scene`
    [2, 16] the rows of `_surface` for wall and ground.
    """
    height, width = out.shape[0] * k, out.shape[1] * k
    depth = np.full((height, width), 1e9)
    owner = np.full((height, width), -1, np.int32)
    du, dv = (window[1] - window[0]) / width, (window[3] - window[2]) / height
    eye = (view[0, 3], view[1, 3], view[2, 3])
    for i in range(local.shape[0]):
        o = _apply(local[i], eye[0], eye[1], eye[2], 1.0)
        for row in range(boxes[i, 1], boxes[i, 3]):
            v = window[3] - (row + 0.5) * dv
            for col in range(boxes[i, 0], boxes[i, 2]):
                d = _apply(view, window[0] + (col + 0.5) * du, v, 1.0, 0.0)
                best = depth[row, col]
                if shape[i, 3] == BLOCK:
                    t = _block_hit(planes[i], eye, d, best)
                else:
                    e = _apply(local[i], d[0], d[1], d[2], 0.0)
                    t = _round_hit(shape[i], o, e, eye[2], d[2], best)
                if t < best:
                    depth[row, col], owner[row, col] = t, i
    c, s, tilt, wall, floor = place[0], place[1], place[2], place[3], place[8]
    sx, sy = c * eye[0] - s * eye[1], s * eye[0] + c * eye[1]
    for row in range(height):
        v = window[3] - (row + 0.5) * dv
        for col in range(width):
            d = _apply(view, window[0] + (col + 0.5) * du, v, 1.0, 0.0)
            i, t = owner[row, col], depth[row, col]
            dark, shine, nx, ny, nz = 1.0, 0.0, -s, -c, 0.0
            if i >= 0:
                p = paints[i]
                x, y, z = eye[0] + t * d[0], eye[1] + t * d[1], eye[2] + t * d[2]
                nx, ny, nz = _normal(local[i], shape[i], planes[i], x, y, z)
                q = _apply(texture[i], x, y, z, 1.0)
                if p[PATTERN] >= BODYWORK:
                    column, shade = _car_paint(p, q[0], q[1], q[2], nx, ny)
                else:
                    column, shade = _person_paint(p, q[0], q[1], q[2])
                if column < 0:
                    r, g, b = (0.8, 0.8, 0.74) if column == -1 else (0.42, 0.02, 0.02)
                else:
                    r, g, b = p[column], p[column + 1], p[column + 2]
                r, g, b = r * shade, g * shade, b * shade
                dark = 0.70 + 0.30 * min(1.0, (z - floor) / place[9])
                glass = p[PATTERN] >= BODYWORK and column == C3
                if glass or p[GLOSS] > 0:
                    norm = math.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
                    facing = -(nx * d[0] + ny * d[1] + nz * d[2]) / norm
                    sun = 2 * facing * (nx * light[0] + ny * light[1] + nz * light[2])
                    sun += (d[0] * light[0] + d[1] * light[1] + d[2] * light[2]) / norm
                    shine = 0.10 * max(0.0, nz) + 0.7 * max(0.0, sun) ** 24
                    shine = p[GLOSS] * (shine + 0.35 * (1 - max(0.0, facing)) ** 4)
                    shine += 0.015 + 0.07 * max(0.0, nz + 0.1) if glass else 0.0
            else:  # the ground, or the wall that stands across the line of sight
                rx, ry = c * d[0] - s * d[1], s * d[0] + c * d[1]
                down = (floor - eye[2]) / d[2] if d[2] < -1e-9 else 1e9
                back = (wall - sy + tilt * sx) / max(ry - tilt * rx, 1e-9)
                t, side = min(down, back), int(back >= down)
                u = sx + t * rx + place[4]
                w = sy + t * ry + place[5] if side else eye[2] + t * d[2] - floor
                r, g, b = _surface(scene[side], u, w)
                if side:  # a soft shadow away from the sun, and a dark patch below
                    nx, ny, nz = 0.0, 0.0, 1.0
                    x, y = eye[0] + t * d[0], eye[1] + t * d[1]
                    reach = min(max(x * place[6] + y * place[7], 0.0), place[10])
                    far = math.hypot(x - reach * place[6], y - reach * place[7])
                    dark = light[3] * max(0.0, 1 - (far / place[11]) ** 2)
                    dark = 1 - dark * (0.8 - 0.4 * reach / place[10])
                    near = math.hypot(x, y * place[13]) / place[12]
                    dark *= 1 - 0.5 * math.exp(-near * near)
                else:
                    dark = 0.7 + 0.3 * min(1.0, w / 0.5)
            lit = max(0.0, nx * light[0] + ny * light[1] + nz * light[2] + 0.15)
            lit *= light[3] * dark
            sky = (0.58 + 0.42 * nz) * (1 - 0.62 * light[3]) * dark
            pixel = out[row // k, col // k]
            pixel[0] += r * (lit * light[4] + sky * light[7]) + shine * dark
            pixel[1] += g * (lit * light[5] + sky * light[8]) + shine * dark
            pixel[2] += b * (lit * light[6] + sky * light[9]) + shine * dark


# ---------------------------------------------------------------- bodies from parts
_NO_PLANES = np.zeros((PLANES, 4))


class _Parts:
    """Primitives of a scene, in the axes of the body: x right, y forward, z up."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.planes: list[np.ndarray] = []
        self.paints: list[np.ndarray] = []

    def round(
        self, a: Any, b: Any, ra: float, rb: float, paint: np.ndarray, *,
        unit: float = 1.0, squash: float = 1.0, side: Any = (1.0, 0.0, 0.0),
        flat: bool = False, local: bool = False, clip: float = 1e9,
    ) -> None:  # fmt: skip
        """Add a tapered capsule from `a` to `b`, `squash` times as deep as wide.

        All lengths are in `unit`s, the texture's too. `side` is the direction of the
        width. A `flat` one ends in discs. The texture is read in the body's axes, or,
        if `local`, in its own. Nothing shows above the height `clip`.
        """
        size = (ra * unit, rb * unit, squash, *side, CONE if flat else CAPSULE)
        ends = (*(np.asarray(a) * unit), *(np.asarray(b) * unit))
        self.rows.append((*ends, *size, clip * unit, local, unit))
        self.planes.append(_NO_PLANES)
        self.paints.append(paint)

    def block(self, outline: Any, half: float, lean: float, paint: np.ndarray) -> None:
        """Add a convex outline of (y, z), clockwise with the front to the right,
        `half` wide to each side at its foot and leaning inwards by `lean`."""
        points = np.array(outline, float)
        edge = np.roll(points, -1, axis=0) - points
        normal = np.stack([-edge[:, 1], edge[:, 0]], 1)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        planes = np.tile([0.0, 0.0, 1.0, 1e6], (PLANES, 1))
        planes[: len(points), 1:3] = normal
        planes[: len(points), 3] = (normal * points).sum(1)
        (y0, z0), (y1, z1) = points.min(0), points.max(0)
        sides = np.array([(x, 0, lean, half + lean * z0) for x in (1, -1)])
        planes[len(points) : len(points) + 2] = sides / math.hypot(1, lean)
        ends = (-half, y0, z0, half, y1, z1)
        self.rows.append((*ends, 1, 1, 1, 1, 0, 0, BLOCK, 1e9, False, 1.0))
        self.planes.append(planes)
        self.paints.append(paint)

    def move(self, first: int, offset: np.ndarray, turn: float) -> None:
        """Turn the parts from `first` on about the vertical, then shift them."""
        c, s = math.cos(turn), math.sin(turn)
        spin = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        for i in range(first, len(self.rows)):
            r = self.rows[i]
            a, b, side = spin @ r[0:3] + offset, spin @ r[3:6] + offset, spin @ r[9:12]
            self.rows[i] = (*a, *b, *r[6:9], *side, *r[12:])

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the first five arrays of `_cast`, then where each part may appear:
        balls about eight places [n, 8, 3] of a radius [n, 1]."""
        r = np.array(self.rows, float)
        a, b, ra, rb, squash = r[:, 0:3], r[:, 3:6], r[:, 6], r[:, 7], r[:, 8]
        length = np.maximum(np.linalg.norm(b - a, axis=1), 1e-4)
        z = (b - a + [0, 0, 1e-9]) / length[:, None]
        z[length <= 1e-4] = (0, 0, 1)
        x = r[:, 9:12] - (r[:, 9:12] * z).sum(1, keepdims=True) * z
        x[np.linalg.norm(x, axis=1) < 1e-3] = (0.31, 0.95, 0.1)  # only round ones
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        after, before = [1, 2, 0], [2, 0, 1]
        y = z[:, after] * x[:, before] - z[:, before] * x[:, after]
        axes = np.stack([x, y, z], 1)
        own, block = r[:, 14, None, None] > 0, r[:, 12, None, None] == BLOCK
        texture = np.where(own, axes, np.eye(3))
        shift = np.where(own, -axes @ a[:, :, None], 0.0)
        texture = np.concatenate([texture, shift], 2) / r[:, 15, None, None]
        axes[:, 1] /= squash[:, None]
        local = np.concatenate([axes, -axes @ a[:, :, None]], 2)
        shape = np.stack([ra, rb, length, r[:, 12], r[:, 13]], 1)
        corner = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]) == 1
        ends = np.where(block, corner, corner[:, :1])
        places = np.where(ends, b[:, None], a[:, None])
        radius = np.maximum(ra, rb) * np.maximum(1, squash) * (r[:, 12] != BLOCK)
        arrays = [local, texture, shape, np.stack(self.planes), np.stack(self.paints)]
        return arrays, places, radius[:, None]


def _paint(
    c0: Any, pattern: int = PLAIN, c1: Any = 0, c2: Any = 0, c3: Any = 0, **more: float
) -> np.ndarray:
    """Return a paint row: sRGB colours become linear, `more` names its columns."""
    row = np.zeros(COLUMNS)
    row[PATTERN] = pattern
    for column, colour in ((C0, c0), (C1, c1), (C2, c2), (C3, c3)):
        row[column : column + 3] = np.power(colour, 2.2)
    for name, value in more.items():
        row[globals()[name.upper()]] = value
    return row


# Clothes have few, dull colours that many share, so colours alone do not tell people
# apart; pattern, cut, hair, hat, bag and build do.
_WARDROBE = [(0.11, 0.11, 0.12), (0.42, 0.42, 0.43), (0.80, 0.79, 0.77),
             (0.17, 0.20, 0.33), (0.52, 0.46, 0.37)]  # fmt: skip


def _cloth(rng: np.random.Generator) -> np.ndarray:
    """Draw an sRGB colour of clothes: black, grey, white, navy or beige, about."""
    colour = rng.choice(_WARDROBE, p=[0.30, 0.20, 0.20, 0.18, 0.12])
    return np.clip(
        colour * rng.uniform(0.92, 1.08) + rng.uniform(-0.015, 0.015, 3), 0.05, 1
    )


def _lacquer(rng: np.random.Generator, vivid: float, grey: float = 0.32) -> np.ndarray:
    """Draw an sRGB colour as vehicles have them: many dark and greyish ones."""
    kind, hue = rng.random(), rng.random()
    s, v = rng.uniform(0.55, 0.8), rng.uniform(0.4, 0.8)
    if 0.2 < hue < 0.5 or hue > 0.72:  # loud greens and purples are rare
        s *= 0.65
    if kind < grey:  # black, grey, white
        s, v = rng.uniform(0, 0.08), rng.choice([0.12, 0.22, 0.45, 0.65, 0.88])
    elif kind < grey + 0.13:  # navy and denim
        hue, s, v = rng.uniform((0.57, 0.3, 0.2), (0.66, 0.6, 0.6))
    elif kind < 1 - vivid:
        s, v = rng.uniform(0.15, 0.45), rng.uniform(0.3, 0.8)
    return np.array(colorsys.hsv_to_rgb(hue, s, v))


def _pick(rng: np.random.Generator, **weights: float) -> str:
    share = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(share), p=share / share.sum())]


def _contrast(colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return `colour`, or a shade of `other` where the two could not be told apart."""
    if abs(colour - other).sum() >= 0.5:
        return colour
    return other * 0.35 if other.mean() > 0.5 else 0.5 * other + 0.45


# fmt: off
_SKIN = [(.93, .76, .66), (.87, .68, .55), (.76, .56, .42), (.62, .43, .31),
         (.45, .30, .21), (.34, .22, .16)]
_HAIR = [(.08, .07, .07), (.16, .11, .08), (.30, .19, .11), (.45, .30, .16),
         (.72, .57, .34), (.55, .54, .53), (.42, .17, .09)]


def _draw_person(rng: np.random.Generator) -> dict[str, Any]:
    """Draw the looks of one person: everything that stays the same over cameras."""
    woman = rng.random() < 0.5
    skin = rng.choice(_SKIN) + rng.uniform(-.04, .04)
    hair = np.clip(rng.choice(_HAIR) + rng.uniform(-.03, .03), .03, 1)
    upper, lower = _cloth(rng), _cloth(rng)
    second, inner = (_contrast(_cloth(rng), upper) for _ in range(2))
    carried = _cloth(rng)
    garment = _pick(rng, tee=.34, sleeves=.32, jacket=.22, coat=.12)
    bag = _pick(rng, none=.42, backpack=.24, shoulder=.20, hand=.14)
    pattern = rng.choice([PLAIN, HOOPS, BARS, CHECK, BLOCKS, BLOTCHES],
                         p=[.16, .24, .17, .17, .11, .15])
    mark = NO_MARK
    if garment in ("jacket", "coat") and rng.random() < .7:
        mark = PANEL
    elif pattern == PLAIN:
        mark = rng.choice([NO_MARK, PRINT_FRONT, PRINT_BACK, PRINT_BOTH],
                          p=[.40, .25, .15, .20])
    ratio = rng.uniform(.62, .74) if pattern == BLOCKS else .5
    cloth: dict[str, Any] = {"c1": second, "c2": inner, "c3": carried, "rough": .30,
                             "ratio": ratio, "frequency": rng.choice([5.0, 8.0, 12.0])}
    torso = _paint(upper, pattern, **cloth, mark=mark,
                   mark_x=rng.uniform(.016, .045) * (1 if mark == PANEL else 1.7),
                   mark_z=rng.uniform(.66, .74), mark_h=rng.uniform(.025, .065),
                   strap={"shoulder": 1, "backpack": 2}.get(bag, 0))
    plain = pattern == BLOCKS or rng.random() < .25
    sleeve = _paint(second if plain else upper, PLAIN if plain else pattern,
                    **{**cloth, "c2": skin},
                    mark=CUT if garment == "tee" else NO_MARK,
                    mark_z=rng.uniform(.07, .14))
    legs = _pick(rng, trousers=.6, shorts=.1, skirt=.2, long=.1) if woman else (
        _pick(rng, trousers=.8, shorts=.2))
    style = _pick(rng, short=.12, bob=.28, long=.38, bun=.2, bald=.02) if woman else (
        _pick(rng, short=.72, bob=.08, long=.06, bun=.02, bald=.12))
    trousers = _paint(lower, rng.choice([PLAIN, HOOPS, BARS, CHECK, BLOCKS],
                                        p=[.40, .16, .18, .14, .12]),
                      c1=_contrast(_cloth(rng), lower), ratio=.5, rough=.34,
                      frequency=rng.choice([5.0, 9.0]))
    hem = {"skirt": rng.uniform(.27, .36), "long": rng.uniform(.10, .20)}.get(
        legs, .36 if garment == "coat" else .5)
    shoes = [(.12, .12, .12), (.85, .85, .85), (.35, .22, .14), _cloth(rng)]
    return {
        "height": rng.normal(1.64 if woman else 1.77, .07),
        "girth": np.clip(rng.normal(1, .11), .82, 1.35),
        "shoulder": rng.normal(.092 if woman else .102, .004),
        "hip": rng.normal(.090 if woman else .083, .003),
        "woman": woman, "style": style, "garment": garment, "legs": legs, "bag": bag,
        "hat": _pick(rng, none=.8, cap=.12, beanie=.08),
        "shirt_hem": rng.uniform(.47, .53), "hem": hem, "loose": rng.uniform(.9, 1.25),
        "bag_size": rng.uniform(.85, 1.2), "bag_side": rng.choice([-1, 1]),
        "skin_paint": _paint(skin, gloss=.04), "torso": torso, "sleeve": sleeve,
        "face": _paint(skin, FACE, np.minimum(hair, skin * .6), skin * [.8, .55, .55],
                       (.1, .07, .06), mark=not woman and rng.random() < .25),
        "hair": _paint(hair, rough=.35, gloss=.06), "trousers": trousers,
        "hat_paint": _paint(_cloth(rng), rough=.2),
        "skirt": torso if garment == "coat" or rng.random() < .4 else trousers,
        "shoe": _paint(shoes[rng.choice(4, p=[.35, .25, .15, .25])], gloss=.08),
        "bag_paint": _paint(carried, rough=.25, gloss=.05),
    }


def _add_person(
    parts: _Parts, who: dict[str, Any], pose: dict[str, float]
) -> float:
    """Add a person in a pose, facing +y, and return the height of the ground.

    Lengths are shares of the stature; joints follow usual body proportions.
    """
    add: Callable[..., None] = partial(parts.round, unit=who["height"])
    skin, torso, cloth, g = (
        who[key] for key in ("skin_paint", "torso", "trousers", "girth"))
    wide, loose, hem, legs = 0.5 * (g + 1), who["loose"], who["hem"], who["legs"]
    hangs = hem < .45  # cloth around the legs: it limits the step and hides the thighs
    stride = min(pose["stride"], .085 / (.53 - hem)) if hangs else pose["stride"]
    bare = legs != "trousers"
    r0, r1, r2 = (.048, .036, .024) if bare else (.050, .039 * loose**.5, .029 * loose)
    below = {"local": True, "clip": hem if hangs else .47 if bare else 1e9}

    # Legs: the thigh swings; the knee bends while the leg comes forward.
    reach, floor = 0.0, 1.0
    for side, phase in ((-1, pose["phase"]), (1, pose["phase"] + math.pi)):
        swing = stride * math.sin(phase)
        shin = swing - .08 - 1.3 * stride * max(0, math.cos(phase)) ** 2
        pitch = .6 * min(shin, 0) + .25 * max(swing, 0)
        hip = (side * .042 * wide, 0, .505)
        knee = np.add(hip, (0, .235 * math.sin(swing), -.235 * math.cos(swing)))
        ankle = np.add(knee, (0, .225 * math.sin(shin), -.225 * math.cos(shin)))
        ahead = .078 * math.cos(pitch), .078 * math.sin(pitch)
        toe = np.add(ankle, (side * .018, *ahead))
        heel = np.add(ankle, (0, -.018, -.026))
        add(hip, knee, r0 * wide, r1 * wide, skin if bare else cloth, **below)
        add(knee, ankle, r1 * wide, r2, skin if bare else cloth, **below)
        if legs == "shorts":
            end = np.add(hip, .85 * np.subtract(knee, hip))
            add(hip, hip, .051 * wide, .051 * wide, cloth)
            add(hip, end, .051 * wide, .049 * wide, cloth, flat=True, local=True)
        add(heel, np.add(toe, (0, 0, -.026)), .025, .018, who["shoe"])
        add(np.add(ankle, (0, 0, -.016)), heel, .025, .025, who["shoe"])
        reach = max(reach, abs(knee[1]))
        floor = min(floor, ankle[2] - .05, toe[2] - .045)

    # Trunk: pelvis, belly, chest, breast, shoulders, neck; skirt or coat; collar.
    hips, waist, chest = who["hip"] * wide, .074 * g, .087 * wide
    s, skirt, z = who["shoulder"] * (.8 + .2 * g), who["skirt"], who["shirt_hem"] + .02
    pelvis = skirt if hangs else cloth
    add((0, 0, .50), (0, 0, .55), hips, hips * .96, pelvis, squash=.7)
    add((0, 0, z), (0, 0, .63), hips, waist, torso, squash=.74, flat=True)
    add((0, 0, .63), (0, .004, .745), waist, chest, torso, squash=.70)
    add((0, .002, .73), (0, -.002, .775), chest, chest * .80, torso, squash=.66)
    for side in (-1, 1):
        if who["woman"]:
            add((side * .036, .036, .722), (side * .036, .036, .722), .034, .034, torso)
        add((side * s, 0, .778), (side * .02, -.004, .828), .027, .030, torso)
    add((0, 0, .815), (0, .012, .885), .034 * wide, .029, skin)
    if hangs:
        bottom = hips + .02 + .16 * (.53 - hem)
        depth = np.clip((reach * (.53 - hem) / .235 + .048) / bottom, .72, .95)
        add((0, 0, hem), (0, 0, .56), bottom, hips * .97, skirt, squash=depth,
            flat=True)
    if who["garment"] in ("jacket", "coat"):
        add((0, 0, .828), (0, .002, .850), .043, .038, torso, flat=True)

    # Arms swing against the legs; one may hold a telephone.
    k, carried, sleeve = who["bag_size"], who["bag_paint"], who["sleeve"]
    thick, fore_paint = (1.0, skin) if who["garment"] == "tee" else (1.1, sleeve)
    for side, phase in ((-1, pose["phase"] + math.pi), (1, pose["phase"])):
        holds = pose["phone"] == side
        swing = .35 if holds else .75 * stride * math.sin(phase) - .05
        bent = swing + (1.75 if holds else .18 + pose["elbow"] + .3 * max(0, swing))
        fore = np.array((-side * .4 * holds, math.sin(bent), -math.cos(bent)))
        down = (side * (.07 + .07 * g), math.sin(swing), -math.cos(swing))
        shoulder = np.array((side * (s + .008), 0, .776))
        elbow = shoulder + .160 * np.array(down)
        wrist = elbow + .138 * fore
        a, b = .028 * wide * thick, .024 * wide * thick
        add(shoulder, elbow, a, b, sleeve, local=True)
        add(elbow, wrist, b, .017 * thick, fore_paint, local=True)
        add(wrist, wrist + .042 * fore, .018, .013, skin)
        if who["bag"] == "hand" and side == who["bag_side"]:
            grip = np.add(wrist, (0, 0, -.06))
            add(grip, np.add(grip, (0, 0, -.10 * k)), .035, .072 * k, carried,
                squash=.4, side=(0, 1, 0), flat=True)
    if who["bag"] == "backpack":
        add((0, -.096, .62), (0, -.094, .745), .072 * k, .064 * k, carried, squash=.62)
        add((0, -.135, .62), (0, -.133, .66), .045 * k, .045 * k, carried, squash=.5)
    elif who["bag"] == "shoulder":
        x = -hips - .03
        add((x, -.03, .50), (x, .03, .50), .052 * k, .052 * k, carried, squash=.42,
            side=(0, 0, 1))

    # Head, hair and hat turn to a side together: y and z of both ends, then radii.
    c, t = math.cos(pose["head"]), math.sin(pose["head"])
    style, hair = who["style"], who["hair"]

    def head(
        ends: Any, ra: float, rb: float, paint: Any, squash: float, **more: bool
    ) -> None:
        a, b = ((-t * y, .010 + c * y, z) for y, z in (ends[:2], ends[2:]))
        add(a, b, ra, rb, paint, squash=squash, side=(c, t, 0), **more)

    head((.004, .905, 0, .943), .038, .047, who["face"], 1.16, local=True)
    head((.054, .926, .059, .917), .005, .008, skin, 1)  # nose
    if style != "bald":
        low = .958 if style == "short" else .948
        head((-.011, low, -.009, .954), .050, .051, hair, 1.12)
    if style == "bob":
        head((-.022, .885, -.014, .945), .052, .051, hair, .85, flat=True)
    elif style == "long":
        head((-.042, .800, -.018, .935), .046, .049, hair, .60)
    elif style == "bun":
        head((-.062, .968, -.066, .973), .025, .025, hair, 1)
    if who["hat"] != "none":
        head((-.004, .962, -.006, .966), .0535, .052, who["hat_paint"], 1.18)
    if who["hat"] == "cap":
        head((.035, .966, .084, .960), .042, .035, who["hat_paint"], .16)
    return floor * who["height"]


# Half width, wheel radius, axles; outlines (y, z) of the bodywork and of the cabin.
_CARS: dict[str, tuple[Any, ...]] = {
    "sedan": (.88, .33, 1.4, -1.4,
              "-2.25 .28 -2.3 .6 -2.2 .98 1 .96 2.1 .78 2.3 .55 2.2 .28",
              "-1.8 .93 -1.05 1.42 .1 1.46 1.1 .93"),
    "hatch": (.85, .31, 1.25, -1.25,
              "-1.9 .28 -1.97 .6 -1.85 1 .85 .98 1.75 .8 1.95 .55 1.9 .28",
              "-1.85 .95 -1.5 1.48 0 1.52 1 .95"),
    "suv": (.93, .38, 1.4, -1.4,
            "-2.25 .38 -2.3 .7 -2.2 1.12 1.05 1.1 2.05 .98 2.25 .7 2.2 .38",
            "-2.18 1.07 -1.95 1.72 .1 1.76 1.1 1.07"),
    "van": (.97, .35, 1.6, -1.5,
            "-2.5 .36 -2.55 .7 -2.5 1.2 1.6 1.18 2.3 .98 2.45 .7 2.4 .36",
            "-2.48 1.15 -2.4 1.98 .9 2 1.75 1.15"),
    "pickup": (.94, .39, 1.6, -1.6,
               "-2.6 .42 -2.65 .7 -2.6 1.08 1.2 1.08 2.3 .98 2.5 .7 2.45 .42",
               "-.75 1.03 -.6 1.7 .45 1.72 1.3 1.03"),
    "bus": (1.25, .48, 3.4, -2.9, "-5.2 .35 -5.25 3 4.9 3.05 5.2 1.3 5.15 .35", ""),
    "truck": (1.1, .46, 2.2, -1.9, "1.3 .5 1.3 2.35 2.75 2.4 3.1 1.4 3.15 .5", ""),
}


def _draw_vehicle(rng: np.random.Generator) -> dict[str, Any]:
    """Draw the looks of one vehicle."""
    kind = _pick(rng, sedan=.30, hatch=.16, suv=.18, van=.12, pickup=.08, bus=.07,
                 truck=.09)
    half, wheel, front, rear, *texts = _CARS[kind]
    body, cabin = (np.array(text.split(), float).reshape(-1, 2) for text in texts)
    stretch = rng.uniform(.94, 1.07) * np.array([1, rng.uniform(.97, 1.04)])
    outline, base = body * stretch, _lacquer(rng, .28, .55)
    other = _contrast(_lacquer(rng, .5), base)
    decal = rng.choice(6, p=[.48, .12, .10, .12, .08, .10])
    top, (front, rear) = outline[:, 1].max(), stretch[0] * np.array([front, rear])
    dark, window = (.08, .08, .09), np.array([.08, .09, .10]) * rng.uniform(.6, 1.6)
    look = {"half": half, "decal": decal, "gloss": rng.uniform(.5, 1)}
    low, high = {"bus": (1.35, 2.45), "truck": (1.45, 2.15)}.get(kind, (99, 99))
    who = {
        "kind": kind, "half": half, "wheel": wheel, "axles": (front, rear), "roof": top,
        "width": 2 * half, "outline": outline, "cabin": None, "box": None,
        "paint": _paint(base, BODYWORK, other, dark, window, **look, wheel=wheel,
                        axle_f=front, axle_r=rear, decal_z=top * rng.uniform(.62, .72),
                        lamp_z=min(.72 * top, .95), window_0=low, window_1=high),
        "dark": _paint(dark, gloss=.1),
        "load_paint": _paint(_lacquer(rng, .2), gloss=.3),
        "load": _pick(rng, none=.6, rack=.25, box=.15),
        "rim": _paint((.06, .06, .06), RIM, [rng.choice([.75, .6, .3])] * 3,
                      wheel=wheel, frequency=float(rng.integers(4, 8))),
    }
    if cabin.size:
        who["cabin"] = cabin * stretch
        low, who["roof"] = who["cabin"][:, 1].min(), who["cabin"][:, 1].max()
        look |= {"half": half - .06, "decal": decal * (decal == 5)}
        who["cabin_paint"] = _paint(
            other if rng.random() < .15 else base, CABIN, other, dark, window, **look,
            axle_f=-.35, axle_r=-9 if kind == "pickup" else -1.35,
            window_0=low + .08, window_1=who["roof"] - .09)
    if kind == "truck":
        who["box"] = stretch * [(-3.3, .95), (-3.3, 3.05), (1.1, 3.05), (1.1, .95)]
        who["box_paint"] = _paint(_lacquer(rng, .2), BODYWORK, other, dark, window,
                                  **look, decal_z=2.1, window_0=99)
    shells = (who[key] for key in ("outline", "cabin", "box") if who[key] is not None)
    ends = np.concatenate(list(shells))
    who["length"], who["height"] = np.ptp(ends[:, 0]), ends[:, 1].max()
    return who


def _add_vehicle(parts: _Parts, who: dict[str, Any]) -> float:
    """Add a vehicle, facing +y, and return the height of the ground."""
    half, wheel, roof, dark = who["half"], who["wheel"], who["roof"], who["dark"]
    end, top = who["outline"][:, 0].min(), who["outline"][:, 1].max()
    parts.block(who["outline"], half, .05, who["paint"])
    if who["kind"] == "truck":
        parts.block(who["box"], half + .05, 0, who["box_paint"])
        frame = [(-3.2, .5), (-3.2, .95), (1.4, .95), (1.4, .5)]
        parts.block(frame, half - .3, 0, dark)
    elif who["kind"] == "pickup":  # the bed
        low, high, y = top - .1, top + .012, end + .15
        bed = [(y, low), (y, high), (-.85, high), (-.85, low)]
        parts.block(bed, half - .14, 0, dark)
    for side in (-1, 1):
        for y in who["axles"]:
            hub, cap = (side * (half - .16), y, wheel), (side * (half + .015), y, wheel)
            parts.round(hub, cap, wheel, wheel, who["rim"], side=(0, 1, 0), flat=True,
                        local=True)
        if who["cabin"] is not None:  # mirrors and a roof rack
            y, x = who["cabin"][:, 0].max() - .35, side * (half + .02)
            parts.round((x, y, 1), (x + side * .14, y, 1.03), .07, .07, dark)
            if who["load"] == "rack":
                a, b = (side * .55, -1.1, roof + .06), (side * .55, .2, roof + .06)
                parts.round(a, b, .03, .03, dark)
    if who["cabin"] is not None:
        parts.block(who["cabin"], half - .06, .28, who["cabin_paint"])
        if who["load"] == "box" and who["kind"] != "pickup":
            a, b = (0, -1, roof + .12), (0, .1, roof + .12)
            parts.round(a, b, .33, .30, who["load_paint"], squash=.42)
    return 0.0
# fmt: on


# ------------------------------------------------------------------ cameras, scenes
# Cell width and height, stagger, joint, change of tone from cell to cell, chequered,
# amplitude and scale of the grain, a band from-to (metres); then the two colours as
# (hue or None for the camera's own, saturation, lightness against the camera's).
# fmt: off
_SURFACES: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] = (
    [  # walls
        (2.1, 1.3, 0, .03, .08, 0, .2, 7, 9, 9, (None, .07, .08), (None, .06, -.15)),
        (.42, .16, .5, .025, .3, 0, .2, 9, 9, 9, (.05, .40, 0), (.10, .08, .12)),
        (1.7, 2.5, 0, .16, .7, 0, 1.2, 2, 0, .45, (.58, .22, -.2), (None, .15, .1)),
        (9, 9, 0, 0, 0, 0, 1.3, 13, 9, 9, (.27, .45, -.1), (.27, .45, 0)),
        (3.1, .13, 0, .03, .1, 0, .1, 5, 9, 9, (None, .20, 0), (None, .20, -.12)),
        (.3, .3, 0, .015, .1, 0, .1, 5, .9, 1.4, (None, .06, .2), (None, .45, 0)),
    ],
    [  # grounds; the first four are roads too
        (.6, .6, 0, .02, .2, 0, .2, 12, 99, 99, (.09, .09, .08), (.09, .10, -.08)),
        (50, 4, 0, .12, 0, 0, .4, 23, 99, 99, (.60, .05, -.06), (.10, .05, .35)),
        (.24, .12, .5, .015, .3, 0, .2, 12, 99, 99, (.03, .22, 0), (.08, .10, -.12)),
        (9, 9, 0, 0, 0, 0, .5, 17, .8, 99, (.09, .14, .06), (.26, .42, -.05)),
        (.5, .5, 0, 0, .08, 1, .1, 9, 99, 99, (.10, .10, .10), (None, .12, -.02)),
        (.18, 2.6, .37, .014, .3, 0, .2, 9, 99, 99, (.08, .30, .04), (.07, .30, -.15)),
    ],
)
# fmt: on


def _scene(wall: int, ground: int, hue: float, *lightness: float) -> np.ndarray:
    """Return the two rows [2, 16] that `_surface` reads: a wall's and a ground's."""
    rows = []
    for table, kind, value in zip(_SURFACES, (wall, ground), lightness, strict=True):
        *numbers, first, second = table[kind]
        for h, s, v in (first, second):
            v = float(np.clip(value + v, 0.08, 0.9))
            rgb = colorsys.hsv_to_rgb(hue if h is None else h, s, v)
            numbers.extend(0.19 + SCENERY * (np.power(rgb, 2.2) - 0.19))
        rows.append(numbers)
    return np.array(rows, float)


@lru_cache(maxsize=64)
def _cameras(kind: str, seed: int, count: int, strength: float) -> list[dict[str, Any]]:
    """Return each camera's value on every axis, and its backdrop."""
    rng = np.random.default_rng([seed, 1])
    even = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    looks: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, (middle, half) in CAMERA_AXES.items():
        for look, value in zip(looks, rng.permutation(even), strict=True):
            look[name] = middle + strength * half * value
    walls, grounds, hues = (rng.permutation(n) for n in (6, 6, count))
    if kind == "vehicle":  # roads
        grounds = rng.permutation(4)
    common = _scene(0, 0, 0.09, *(CAMERA_AXES[name][0] for name in ("wall", "ground")))
    for i, look in enumerate(looks):
        kinds = walls[i % len(walls)], grounds[i % len(grounds)]
        own = _scene(*kinds, hues[i] / count, look["wall"], look["ground"])
        look["scene"] = common + min(strength, 1.0) * (own - common)
    return looks


@lru_cache(maxsize=4096)
def _identity(kind: str, seed: int, split: int, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 2, split, number])
    return _draw_person(rng) if kind == "person" else _draw_vehicle(rng)


def render_image(
    config: SyntheticConfig, split: int, number: int, camera: int, frame: int,
    height: int = 64, width: int = 32,
) -> np.ndarray:  # fmt: skip
    """Render one picture.

    Parameters
    ----------
    config : SyntheticConfig
        Of it, only kind, cameras, strength and seed matter here.
    split, number : int
        0 for training, 1 for test; and which identity of that split.
    camera, frame : int
        Which camera, and which picture of the identity there.
    height, width : int
        Size in pixels.

    Returns
    -------
    uint8 array [height, width, 3]
        sRGB; depends on nothing but the arguments.
    """
    kind, seed = config.kind, config.seed or 0
    look = _cameras(kind, seed, config.cameras, config.strength)[camera]
    who, person = _identity(kind, seed, split, number), kind == "person"
    track = np.random.default_rng([seed, 3, split, number, camera])
    rng = np.random.default_rng([seed, 4, split, number, camera, frame])

    # Which way it faces, where it stands, and how. `track` is shared by the pictures
    # of one identity in one camera, as in a tracklet.
    heading = look["azimuth"] + track.normal(0, HEADING) + rng.normal(0, 6)
    heading = math.radians(heading + 180 * (track.random() < TURNED))
    way = np.array([math.sin(heading), -math.cos(heading)])
    place = track.uniform(-6, 6, 2) + frame * track.uniform(0.2, 0.5) * way
    pose = {
        "stride": track.uniform(0.30, 0.46) if track.random() < 0.85 else 0.06,
        "elbow": track.uniform(0, 0.35),
        "phone": track.choice([-1, 0, 1], p=[0.06, 0.88, 0.06]),
        "phase": rng.uniform(0, 2 * math.pi),
        "head": math.radians(rng.normal(0, 14)),
    }
    parts = _Parts()
    floor = _add_person(parts, who, pose) if person else _add_vehicle(parts, who)
    own, tall = len(parts.rows), who["height"]

    # The eye. `back` takes the camera's level axes (right, away, up) to the body's.
    steep = look["elevation"] + (0 if person else VEHICLE_ELEVATION) + rng.normal(0, 1)
    steep = math.radians(float(np.clip(steep, 1.5, 60)))
    c, s = math.cos(math.pi + heading), math.sin(math.pi + heading)
    cs, sn = math.cos(steep), math.sin(steep)
    back = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    axes = back @ [[1, 0, 0], [0, sn, cs], [0, cs, -sn]]  # to right, up, forward
    eye = np.array([0, 0, 0.5 * tall])
    eye -= axes[:, 2] * (8.0 if person else 4.5 * who["length"])

    if person and track.random() < PASSER_BY:
        _add_person(parts, _draw_person(track), pose | {"phase": rng.uniform(0, 6)})
        aside = track.choice([-1, 1]) * track.uniform(0.48, 0.62)
        beside = back @ [aside, track.choice([-0.5, 0.9]), 0]
        parts.move(own, beside, track.uniform(-1, 1))
    if track.random() < look["occlusion"]:  # by a dull pole or bin
        scale, bin_ = 1.0 if person else who["length"] / 2.2, track.random() < 0.6
        grey = track.uniform(0.2, 0.5) + track.uniform(-0.04, 0.04, 3)
        aside = track.choice([-1, 1]) * track.uniform(0.14, 0.34) + rng.normal(0, 0.03)
        foot = back @ [aside * scale, -0.95 * scale, floor / scale]
        top = np.add(foot, (0, 0, scale * (track.uniform(0.5, 0.8) if bin_ else 4)))
        low, high = (0.20 * scale, 0.24 * scale) if bin_ else (0.05, 0.045)
        parts.round(foot, top, low, high, _paint(grey, rough=0.1), flat=True)

    # The crop follows the body alone; then among which rays each part can appear.
    arrays, places, radius = parts.arrays()
    seen = (places - eye) @ axes
    depth = np.maximum(seen[..., 2:], 0.05)
    centre, reach = seen[..., :2] / depth, 1.02 * radius[..., None] / depth
    low, high = (centre - reach).min(1), (centre + reach).max(1)
    corner, size = _crop(
        low[:own].min(0), high[:own].max(0), height / width, person, rng
    )
    rays = 2 if height <= 128 else 1  # what more would show, the blur hides
    across = (np.stack([low, high], 1) - corner) / size  # 0..1 over the picture
    across[..., 1] = 1 - across[:, ::-1, 1]  # rows run downwards
    edges = across * (rays * width, rays * height)
    edges = np.concatenate([np.floor(edges[:, 0]), np.ceil(edges[:, 1])], 1)
    boxes = np.clip(edges, 0, rays * np.array([width, height] * 2)).astype(np.int32)
    window = np.array([corner, corner + size]).T.ravel()

    around = math.radians(look["sun_azimuth"])
    above = float(np.clip(math.radians(look["sun_elevation"]), 0.3, 1.4))
    flat = np.array([math.sin(around), -math.cos(around), 0])
    sun = back @ (math.cos(above) * flat + (0, 0, math.sin(above)))
    share = float(np.clip(look["sun"], 0, 1))
    light = np.array([*sun, share, 1.45, 1.37, 1.22, 1.0, 1.04, 1.12])
    wall = (3.2 if person else 9.0) + 0.4 * math.sin(7 * look["elevation"])
    frame_of = (c, s, 0.15 * math.sin(look["sun_azimuth"]), wall, *place)
    away = -(back @ flat)[:2]  # from the sun: where the shadow falls
    shade = (0.24, 0.30, 1.0) if person else (0.7 * who["width"], 1.35, 0.42)
    length = min(1 / math.tan(above), 1.6) * tall
    ground = np.array([*frame_of, *away, floor, 0.2 * tall, length, *shade])
    out = np.zeros((height, width, 3))
    view = np.concatenate([axes, eye[:, None]], 1)
    _cast(*arrays, boxes, view, window, light, ground, look["scene"], rays, out)
    # The light changes between a day's tracks, so a camera's mean colour tells little.
    even, tint = (0.15, 0.08) if person else (0.06, 0.0)
    drift = track.normal(0, even) + track.normal(0, tint, 3)
    return _sensor(out / rays**2, look, drift, rng)


def _crop(
    low: np.ndarray, high: np.ndarray, aspect: float, person: bool, rng: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return a corner and the size of the picture, as cut by a detector."""
    middle, (wide, tall) = (low + high) / 2, high - low
    loose, aside = (1.22, 0.09) if person else (1.15, 0.06)
    margin = rng.uniform(1.04, loose)
    dx, dy = rng.uniform(-aside, aside), rng.uniform(-0.4, 0.4)
    if person:  # the height counts, whatever the arms do
        size = np.array([tall * margin / aspect, tall * margin])
    else:  # a long vehicle is squeezed a little, as data sets do
        rows = max(tall, wide * aspect * 0.72) * margin
        size = np.array([max(wide * margin, rows / aspect), rows])
    # Never so far up or down that the head or the feet are cut off.
    shift = np.array([dx * size[0], dy * (size[1] - tall)])
    return middle + shift - size / 2, size


def _sensor(
    image: np.ndarray, look: dict[str, Any], drift: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Turn linear light [h, w, 3] into the camera's 8-bit picture."""
    height, width = image.shape[:2]
    gain = np.array([look["red"], look["green"], look["blue"]]) + look["exposure"]
    image = image * (1.25 * np.exp(gain + drift))
    blur = max(look["blur"], 0.05) * height / 64
    image = gaussian_filter(image, (blur, blur, 0), mode="nearest", truncate=2.5)
    image = image / (1 + np.maximum(image - 0.7, 0) * 0.6)  # a soft shoulder
    image = np.clip(image, 0, 1) ** (math.exp(look["gamma"]) / 2.2)
    grey = (image @ [0.3, 0.59, 0.11])[..., None]
    image = grey + math.exp(look["saturation"]) * (image - grey)
    image += float(np.clip(look["haze"], 0, 0.5)) * (0.72 - image)
    # The camera saw it at its own size: shrink, add noise, compress, enlarge.
    rows = min(max(round(math.exp(look["rows"])), 16), height)
    picture = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
    if rows < height:
        size = (max(round(width * rows / height), 8), rows)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    grain = rng.standard_normal((picture.height, picture.width, 3), np.float32)
    noise = 255 * max(look["noise"], 0) * (0.5 * grain + 0.5 * grain[..., :1])
    array = np.clip(np.asarray(picture) + noise + 0.5, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    quality = int(np.clip(round(look["jpeg"]), 20, 98))
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    picture = Image.open(buffer)
    if rows < height:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


# ------------------------------------------------------------------- the data set
def _columns(config: SyntheticConfig) -> np.ndarray:
    """Return [N, 4] of (split, number, camera, frame), in shuffled order.

    The order tells nothing about identities: it is a random permutation.
    """
    rows = []
    for split, count in enumerate((config.identities, config.test_identities)):
        for number in range(count):
            rng = np.random.default_rng([config.seed or 0, 5, split, number])
            passes = np.flatnonzero(rng.random(config.cameras) < config.presence)
            if len(passes) < 2:
                passes = rng.permutation(config.cameras)[:2]
            for camera in passes:
                frames = range(config.images_per_camera)
                rows += [(split, number, camera, frame) for frame in frames]
    rng = np.random.default_rng([config.seed or 0, 6])
    return rng.permutation(np.array(rows, np.int64))


def render_dataset(
    config: SyntheticConfig,
    height: int = 64,
    width: int | None = None,
    *,
    workers: int = 0,
    cache: Path | None = None,
) -> ReIDDataset:
    """Render the embedded data set, or take it from the cache.

    Parameters
    ----------
    config : SyntheticConfig
        What to render.
    height, width : int
        Size of the pictures in pixels; by default, persons are half as wide as high,
        and vehicles as wide as high.
    workers : int
        Processes that render; 0 renders in this one. The pictures are the same.
    cache : Path, optional
        Folder of rendered sets; by default the environment's O2CAP_CACHE, else the
        user's cache folder of the system.

    Returns
    -------
    ReIDDataset
        Training identities are 0 … identities − 1, those of the test follow. The first
        picture of a test identity in a camera is a query, the others are gallery.
        Files are numbered in an order that tells nothing about the identities.

    Raises
    ------
    InputError
        For a size or a number of workers that cannot be used.
    """
    width = width or (height // 2 if config.kind == "person" else height)
    if min(height, width) < 16 or max(height, width) > 2048:
        raise InputError(
            f"a picture of {height} x {width}: give 16 to 2048 pixels a side"
        )
    if workers < 0:
        raise InputError(f"workers must be at least 0: {workers}")
    rows = _columns(config)
    # The source is part of the key: another renderer makes another set.
    settings = json.dumps([asdict(config), height, width], sort_keys=True).encode()
    key = hashlib.sha256(settings + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = (cache or cache_folder()) / f"{config.kind}-{key}"
    names = [f"{i:06d}.png" for i in range(len(rows))]
    if sum(1 for _ in folder.glob("images/*.png")) != len(rows):
        shutil.rmtree(folder, ignore_errors=True)  # something tidied parts of it away
        with _unfinished(folder) as part:
            (part / "images").mkdir()
            job = partial(_render_file, config, height, width, part / "images")
            with ExitStack() as stack:
                run: Any = map
                if workers:  # spawned, since threads and fork do not go together
                    pool = ProcessPoolExecutor(workers, get_context("spawn"))
                    run = partial(stack.enter_context(pool).map, chunksize=32)
                for _ in run(job, names, rows.tolist()):
                    pass
    split, number, camids, frame = torch.from_numpy(rows).T
    paths = [folder / "images" / name for name in names]
    pids = number + split * config.identities
    everything = ImageSet(paths, camids.contiguous(), pids)
    train, query = split == 0, (split == 1) & (frame == 0)
    parts = (everything.select(mask) for mask in (train, query, ~(train | query)))
    return ReIDDataset(f"synthetic-{config.kind}", *parts)


def _render_file(
    config: SyntheticConfig, height: int, width: int, folder: Path, name: str, key: Any
) -> None:
    split, number, camera, frame = key
    array = render_image(config, split, number, camera, frame, height, width)
    Image.fromarray(array).save(folder / name, compress_level=3)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        with suppress(OSError):
            folder.rmdir()  # renaming onto an empty folder fails on some systems
        try:
            part.rename(folder)
        except OSError:  # a twin was first, with the same pictures?
            if not folder.is_dir() or not any(folder.iterdir()):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export_market1501(dataset: ReIDDataset, folder: Path) -> None:
    """Write a data set in the Market-1501 layout.

    Pictures are copied as they are, to names such as 0007_c1s1_000012_00.png: identity,
    camera from 1 on, and a running number. The folder appears only when complete.

    Raises
    ------
    InputError
        If `folder` exists and is not an empty folder, or an identity is unknown.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: give a new folder to export to")
    places = ("bounding_box_train", "query", "bounding_box_test")
    with _unfinished(folder) as part:
        for (split, images), place in zip(
            dataset.splits().items(), places, strict=True
        ):
            (part / place).mkdir()
            if images.pids is None or bool((images.pids < 0).any()):
                raise InputError(f"{split} has unknown identities: the names need them")
            known = torch.stack([images.pids, images.camids + 1], 1).tolist()
            for i, (pid, camera) in enumerate(known):
                path = images.paths[i]
                name = f"{pid:04d}_c{camera}s1_{i:06d}_00{path.suffix}"
                shutil.copyfile(path, part / place / name)
