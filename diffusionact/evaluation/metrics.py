"""Distances between pictures, and between the faces in them. NumPy and OpenCV only.

Pictures are arrays [H,W] or [H,W,C] of any real type, compared in float64; the result does not
depend on the order of the colours. Faces are 68 landmarks (iBUG order), one iris point per eye
and three angles; where a value is NaN (a point that is unknown or cannot be seen) it is left out
of the mean, and a mean over nothing is NaN.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusionact.errors import SettingsError
from diffusionact.landmarks import EYE_A, EYE_B

Float = NDArray[np.float64]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_K1, SSIM_K2 = 0.01, 0.03
LUMA_BGR = np.array([0.114, 0.587, 0.299])


def psnr(reference: ArrayLike, image: ArrayLike, data_range: float = 255.0) -> float:
    """The peak signal-to-noise ratio of a picture, in dB.

    10 log10(data_range^2 / MSE), the mean over pixels and channels. 0 dB and less to infinity
    (equal pictures); higher is better.

    reference, image: [H,W] or [H,W,C], same shape, values spanning data_range
    Raises: SettingsError when the shapes differ.
    Source: scikit-image `peak_signal_noise_ratio`, which it equals.
    """
    a, b = _pair(reference, image)
    mse = float(np.mean(np.square(a - b)))
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


def l1(reference: ArrayLike, image: ArrayLike, data_range: float = 255.0) -> float:
    """The mean absolute difference of two pictures as a fraction of the range of their values.

    mean |reference - image| / data_range. 0 (equal) to 1; lower is better. For pictures in
    [-1, 1] the published tables' figure is this one with data_range=1, twice the fraction.

    reference, image: [H,W] or [H,W,C], same shape
    Raises: SettingsError when the shapes differ.
    """
    a, b = _pair(reference, image)
    return float(np.mean(np.abs(a - b))) / data_range


def ssim(reference: ArrayLike, image: ArrayLike, data_range: float = 255.0) -> float:
    """The mean structural similarity of two pictures.

    ((2 m_a m_b + C1)(2 s_ab + C2)) / ((m_a^2 + m_b^2 + C1)(s_a^2 + s_b^2 + C2)) with local means,
    variances and covariance under a Gaussian window of 11x11 pixels, sigma 1.5, C1 = (0.01 R)^2,
    C2 = (0.03 R)^2; the mean over the channels and the pixels whose window lies in the picture.
    -1 to 1 (equal); higher is better.

    reference, image: [H,W] or [H,W,C], same shape, both sides at least 11 pixels
    Raises: SettingsError when the shapes differ or a side is shorter than the window.
    Source: Wang, Bovik, Sheikh, Simoncelli 2004, Eq. 13; equals scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    """
    a, b = _pair(reference, image)
    if min(a.shape[:2]) < 2 * SSIM_RADIUS + 1:
        raise SettingsError(f"SSIM needs pictures of at least 11x11 pixels, got {a.shape[:2]}")
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variance = _window_mean(a * a) + _window_mean(b * b) - mean_a**2 - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance + c2)
    inner = slice(SSIM_RADIUS, -SSIM_RADIUS)
    return float(np.mean(similarity[inner, inner]))


def landmark_error(points: ArrayLike, reference: ArrayLike) -> float:
    """The mean distance of landmarks from where they should be, in pixels.

    mean_k |p_k - r_k|, in the plane of the picture. 0 upwards; lower is better.

    points, reference: [...,K,>=2], pixels of one picture; only x and y count
    """
    return _mean(np.linalg.norm(_plane(points) - _plane(reference), axis=-1))


def landmark_nme(points: ArrayLike, reference: ArrayLike) -> float:
    """The normalised mean error of landmarks: their error over the inter-ocular distance.

    mean_k |p_k - r_k| / |r_36 - r_45|, normalised by the distance of the outer corners of the
    reference's eyes. A fraction, 0 upwards; lower is better. A face in profile has its eyes
    close together in the picture, and so a larger error for the same pixels.

    points, reference: [...,68,>=2], pixels of one picture; only x and y count
    Source: 300 Faces in the Wild (Sagonas et al. 2016), "inter-ocular" normalisation.
    """
    distance = np.linalg.norm(_plane(points) - _plane(reference), axis=-1)
    return _mean(distance / interocular_distance(reference)[..., None])


def interocular_distance(points: ArrayLike) -> Float:
    """The distance between the outer corners of the eyes (points 36 and 45), in pixels.

    points: [...,68,>=2], pixels
    """
    corners = _plane(points)[..., (36, 45), :]
    return np.asarray(np.linalg.norm(corners[..., 1, :] - corners[..., 0, :], axis=-1))


def gaze_offset(gaze: ArrayLike, points: ArrayLike) -> Float:
    """The place of each iris from the centre of its eye [...,2,2], in pixels.

    The centre is the mean of the eye's six landmarks.

    gaze: [...,2,2], pixels, iris of eye 36-41, then of eye 42-47
    points: [...,68,>=2], pixels
    Source: DiffusionAct, Eq. 9, solved for what the gaze adds to the centre of the eye.
    """
    xy = _plane(points)
    centres = np.stack([xy[..., eye, :].mean(axis=-2) for eye in (EYE_A, EYE_B)], axis=-2)
    return np.asarray(_plane(gaze) - centres)


def gaze_error(
    gaze: ArrayLike, points: ArrayLike, reference_gaze: ArrayLike, reference_points: ArrayLike
) -> float:
    """The mean error of the direction of gaze as it shows in the picture, in pixels.

    mean over both eyes of |o - o_r|, o the iris' offset from the centre of its eye
    (`gaze_offset`): a face that looks the right way from the wrong place has no gaze error.
    0 upwards; lower is better. An eye whose iris is NaN in either is left out.

    gaze, reference_gaze: [...,2,2], pixels; points, reference_points: [...,68,>=2], pixels
    """
    seen = gaze_offset(gaze, points)
    wanted = gaze_offset(reference_gaze, reference_points)
    return _mean(np.linalg.norm(seen - wanted, axis=-1))


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> float:
    """The likeness of two identities: the cosine of the angle between their embeddings (CSIM).

    a.b / (|a| |b|). -1 to 1 (one identity); higher is better. NaN where either is zero.

    a, b: [E], embeddings of a face recognition network; the tables' is ArcFace
    Raises: SettingsError when the lengths differ.
    Source: Deng et al. 2019, ArcFace; CSIM of Zakharov et al. 2019, section 4.
    """
    x, y = _pair(a, b)
    length = math.sqrt(float(np.dot(x, x)) * float(np.dot(y, y)))
    return float(np.clip(np.dot(x, y) / length, -1, 1)) if length > 0 else math.nan


def expression_error(expression: ArrayLike, reference: ArrayLike) -> float:
    """The mean absolute difference of expression coefficients, in the face model's own units.

    mean_k |e_k - r_k|. 0 upwards; lower is better. Figures of two face models, or of two readers
    of one model, cannot be compared.

    expression, reference: [E] coefficients
    Source: average expression distance (AED) of the reenactment papers.
    Raises: SettingsError when the lengths differ.
    """
    a, b = _pair(reference, expression)
    return _mean(np.abs(a - b))


def brightness_shift(reference: ArrayLike, image: ArrayLike, data_range: float = 255.0) -> float:
    """How much brighter a picture is than another: the difference of their mean luma, as a
    fraction of the range.

    (Y(image) - Y(reference)) / data_range, Y the mean of 0.299 R + 0.587 G + 0.114 B. -1 to 1,
    positive when brighter; 0 is best. Of BGR pictures, as OpenCV reads them.

    reference, image: [H,W,3] BGR or [H,W]; their sizes may differ
    Source: ITU-R BT.601 luma. What the paper's figure on brightness measures is not stated as a
    formula in any source that could be read; this is our definition.
    """
    return (mean_luma(image) - mean_luma(reference)) / data_range


def mean_luma(image: ArrayLike) -> float:
    """The mean of 0.299 R + 0.587 G + 0.114 B over a picture, in its own units.

    image: [H,W,3] BGR or [H,W]. Source: ITU-R BT.601.
    """
    return float(_luma(image).mean())


def pose_error(pose: ArrayLike, reference: ArrayLike) -> float:
    """The mean absolute difference of the head's angles, in degrees.

    mean over yaw, pitch and roll of |a - a_r|, the shorter way round. 0 to 180; lower is better.

    pose, reference: [...,3] yaw, pitch, roll, degrees
    Source: average pose distance (APD) of the reenactment papers, on Euler angles.
    """
    difference = np.asarray(pose, np.float64) - np.asarray(reference, np.float64)
    return _mean(np.abs((difference + 180) % 360 - 180))


def mouth_opening(points: ArrayLike) -> Float:
    """How far the lips are apart, as a fraction of the height from the eyes to the nose's base.

    The mean distance of the three pairs of inner-lip points (61-67, 62-66, 63-65) over the
    distance from the mean of both eyes to point 33. 0 (closed) to about 1. The unit is upright
    in the face, because a width would shrink with yaw.

    points: [...,68,>=2], pixels
    """
    xy = _plane(points)
    gap = np.linalg.norm(xy[..., 61:64, :] - xy[..., (67, 66, 65), :], axis=-1).mean(axis=-1)
    eyes = xy[..., 36:48, :].mean(axis=-2)
    return np.asarray(gap / np.linalg.norm(xy[..., 33, :] - eyes, axis=-1))


def eye_opening(points: ArrayLike) -> Float:
    """How far each eye is open [...,2]: its aspect ratio.

    (|p_1 - p_5| + |p_2 - p_4|) / (2 |p_0 - p_3|) over the eye's six points. 0 (closed) to
    about 0.5.

    points: [...,68,>=2], pixels
    Source: Soukupova and Cech 2016, Eq. 1.
    """
    xy = _plane(points)
    ratios = []
    for eye in (EYE_A, EYE_B):
        p = xy[..., eye, :]
        lids = np.linalg.norm(p[..., (1, 2), :] - p[..., (5, 4), :], axis=-1).mean(axis=-1)
        ratios.append(lids / np.linalg.norm(p[..., 0, :] - p[..., 3, :], axis=-1))
    return np.stack(ratios, axis=-1)


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two series over the places where both have a value.

    cov(a, b) / (s_a s_b). -1 to 1 (one rises as the other does); NaN when fewer than two places
    are left or when either series is constant there.

    a, b: [N], any units
    Raises: SettingsError when the lengths differ.
    """
    x, y = _pair(a, b)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)), -1, 1))


def gap_closed(copy: float, ours: float, oracle: float) -> float:
    """The share of the way from one yardstick to another that a method has gone.

    (copy - ours) / (copy - oracle), for errors and likenesses alike. 0: no better than copying
    the source; 1: as good as the oracle; NaN when the yardsticks agree.
    """
    return math.nan if copy == oracle else (copy - ours) / (copy - oracle)


def _luma(image: ArrayLike) -> Float:
    a = np.asarray(image, np.float64)
    return a @ LUMA_BGR if a.ndim == 3 else a


def _pair(reference: ArrayLike, image: ArrayLike) -> tuple[Float, Float]:
    a, b = np.asarray(reference, np.float64), np.asarray(image, np.float64)
    if a.shape != b.shape:
        raise SettingsError(
            f"cannot compare arrays of shapes {a.shape} and {b.shape}; resize or trim one first"
        )
    return a, b


def _plane(points: ArrayLike) -> Float:
    return np.asarray(points, np.float64)[..., :2]


def _mean(values: Float) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _window_mean(image: Float) -> Float:
    kernel = cv2.getGaussianKernel(2 * SSIM_RADIUS + 1, SSIM_SIGMA, cv2.CV_64F)
    filtered = cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel, borderType=cv2.BORDER_REFLECT)
    return np.asarray(filtered, np.float64).reshape(image.shape)
