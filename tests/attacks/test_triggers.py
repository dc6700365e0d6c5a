"""Each trigger against pixels worked out by hand or by a second, independent computation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdfast.attacks import LF, SIG, BadNets, Blended, WaNet, get, names

from .conftest import make_set, ready


def black(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


# --- BadNets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(32, 32, 3, 3), (64, 64, 6, 6), (8, 8, 3, 3), (28, 28, 3, 3), (224, 224, 21, 21), (48, 48, 5, 5), (32, 64, 3, 6)],
)
def test_badnets_square_scales_with_the_image(height: int, width: int, rows: int, columns: int) -> None:
    expected = black(1, 3, height, width)
    expected[:, :, height - rows :, width - columns :] = 255
    assert torch.equal(BadNets().apply(black(1, 3, height, width)), expected)


def test_badnets_leaves_everything_outside_the_patch() -> None:
    images, _ = make_set(4)
    out = BadNets().apply(images)
    images[:, :, 29:, 29:] = 255
    assert torch.equal(out, images)


def test_badnets_checker_draws_black_too() -> None:
    out = BadNets(pattern="checker").apply(torch.full((1, 1, 32, 32), 9, dtype=torch.uint8))
    assert out[0, 0, 28:, 28:].tolist() == [[9, 9, 9, 9], [9, 0, 0, 255], [9, 0, 255, 0], [9, 255, 0, 255]]


def test_badnets_opacity() -> None:
    out = BadNets(size=1, alpha=0.5).apply(torch.full((1, 1, 2, 2), 100, dtype=torch.uint8))
    assert out.tolist() == [[[[100, 100], [100, 177]]]]  # 100 + 0.5 * 155 = 177.5


def test_badnets_own_pattern_overwrites_where_it_is_positive() -> None:
    pattern = torch.tensor([[[255, 0]], [[0, 0]], [[0, 7]]], dtype=torch.uint8)  # red, then nearly black blue
    out = BadNets(pattern=pattern).apply(torch.full((1, 3, 1, 3), 50, dtype=torch.uint8))
    assert out[0].tolist() == [[[50, 255, 50]], [[50, 50, 50]], [[50, 50, 7]]]


def test_badnets_own_mask_wins() -> None:
    pattern, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.2]])
    out = BadNets(pattern=pattern, mask=mask).apply(torch.full((1, 2, 1, 2), 100, dtype=torch.uint8))
    assert out[0].tolist() == [[[0, 131]], [[0, 131]]]  # 100 + 0.2 * 155


def test_badnets_errors() -> None:
    with pytest.raises(ValueError, match=r"badnets: `size` expected a patch within the 4 x 4 images, got 5 x 5"):
        BadNets(size=5).apply(black(1, 1, 4, 4))
    with pytest.raises(ValueError, match="2 x 2 images, got 3 x 3"):
        BadNets().apply(black(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"BadNets: `pattern` expected one of white, checker"):
        BadNets(pattern="red")
    with pytest.raises(ValueError, match="`mask` expected None with a named pattern"):
        BadNets(mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="`size` expected None with an own pattern"):
        BadNets(pattern=torch.ones(3, 3), size=3)
    with pytest.raises(ValueError, match="`mask` expected the pattern's height and width"):
        BadNets(pattern=torch.ones(3, 3), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="`alpha` expected a number"):
        BadNets(alpha=1.5)
    with pytest.raises(TypeError, match="`size` expected an integer"):
        BadNets(size=3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`size` expected an integer in \[1, 4096\]"):
        BadNets(size=0)
    with pytest.raises(TypeError, match="`pattern` expected an image"):
        BadNets(pattern=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"values outside \[0, 1\]"):
        BadNets(pattern=torch.full((3, 3), 2.0))
    with pytest.raises(ValueError, match="expected 1 channel or 3"):
        BadNets(pattern=torch.ones(2, 3, 3)).apply(black(1, 3, 8, 8))


# --- Blended ----------------------------------------------------------------------------------------------------------


def test_blended_is_exact_and_has_its_own_opacity_at_test_time() -> None:
    attack = Blended(pattern=torch.tensor([[255, 1]], dtype=torch.uint8), alpha=0.1, test_alpha=0.2)
    image = torch.full((1, 1, 1, 2), 101, dtype=torch.uint8)
    assert attack.apply(image, "poison").flatten().tolist() == [116, 91]  # 116.4, 91.0
    assert attack.apply(image, "test").flatten().tolist() == [131, 81]  # 131.8, 81.0


def test_blended_without_quantising_is_the_formula() -> None:
    x, t = torch.rand(3, 3, 6, 5, dtype=torch.float64), torch.rand(3, 6, 5, dtype=torch.float64)
    out = Blended(pattern=t, alpha=0.3).apply(x, quantize=False)
    torch.testing.assert_close(out, 0.7 * x + 0.3 * t, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pattern", ["blend-proc", "noise"])
def test_generated_patterns_fill_the_range_and_follow_their_seed(pattern: str) -> None:
    t = Blended(pattern=pattern).trigger_image(3, 32, 32)
    assert t.shape == (3, 32, 32)
    assert t.dtype == torch.float64
    assert 0 <= t.min() < 20
    assert 235 < t.max() <= 255
    assert torch.equal(t, Blended(pattern=pattern).trigger_image(3, 32, 32))
    assert not torch.equal(t, Blended(pattern=pattern, pattern_seed=1).trigger_image(3, 32, 32))
    assert not torch.equal(t[0], t[1])


def test_blend_proc_is_cosines_plus_a_checker_of_a_quarter() -> None:
    t = Blended().trigger_image(1, 32, 32)[0] / 255
    tile = (torch.arange(32) // 8)[:, None] + (torch.arange(32) // 8)[None]
    waves = (t - 0.25 * (tile % 2)) / 0.75
    assert abs(waves.min()) < 1e-12
    assert abs(waves.max() - 1) < 1e-12
    spectrum = torch.fft.fft2(waves).abs() / 1024
    cycles = torch.fft.fftfreq(32, 1 / 32).abs()
    outside = (cycles[:, None] > 4) | (cycles[None] > 4)
    assert spectrum[outside].max() < 1e-12


def test_blended_reads_and_resizes_an_image_file(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    flat = np.full((10, 20, 3), (200, 100, 0), dtype=np.uint8)
    image.fromarray(flat).save(tmp_path / "trigger.png")
    for path in (tmp_path / "trigger.png", str(tmp_path / "trigger.png")):
        t = Blended(pattern=path).trigger_image(3, 8, 8)
        torch.testing.assert_close(t[:, 3, 3], torch.tensor([200.0, 100.0, 0.0], dtype=torch.float64))
    grey = Blended(pattern=tmp_path / "trigger.png").trigger_image(1, 10, 20)
    torch.testing.assert_close(grey[0, 0, 0].item(), 0.299 * 200 + 0.587 * 100)


def test_blended_resizes_by_area_when_it_shrinks() -> None:
    fine = (torch.arange(64)[None] % 2 * 255).to(torch.uint8).expand(64, 64)
    t = Blended(pattern=fine).trigger_image(1, 8, 8)
    assert (t[0, :, 1:-1] - 127.5).abs().max() < 4  # anti-aliased: no stripe survives


def test_blended_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Blended: `pattern` expected the path of an image file, got 'hello"):
        Blended(pattern="hello_kitty.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="an image that Pillow can read"):
        Blended(pattern=tmp_path / "text.png")
    with pytest.raises(ValueError, match="`alpha`"):
        Blended(alpha=-0.1)
    with pytest.raises(ValueError, match="`test_alpha`"):
        Blended(test_alpha=2.0)
    with pytest.raises(ValueError, match="`pattern_seed`"):
        Blended(pattern_seed=-1)
    with pytest.raises(ValueError, match="expected 1 channel or 2, as the images have, got 3 channels"):
        Blended(pattern=torch.ones(3, 4, 4)).apply(black(1, 2, 4, 4))


def test_a_huge_image_file_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("L", (30, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr("bdfast.attacks.patterns.MAX_FILE_PIXELS", 899)
    with pytest.raises(ValueError, match="at most 899 pixels, got 30 x 30"):
        Blended(pattern=tmp_path / "big.png")


# --- SIG --------------------------------------------------------------------------------------------------------------


def test_sig_is_the_formula_truncated() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(256, 2, 2, 32)
    out = SIG().apply(levels)
    # Exact arithmetic with fractions of pi: sin(3 pi j / 8) from its four magnitudes.
    for j in range(32):
        angle = (3 * j) % 16
        sign = 1 if angle < 8 else -1
        magnitude = {0: 0.0, 1: 15.307337, 2: 28.284271, 3: 36.955181, 4: 40.0}[min(angle % 8, 8 - angle % 8)]
        expected = [min(255, max(0, math.floor(x + sign * magnitude))) for x in range(256)]
        assert out[:, 1, 1, j].tolist() == expected, j


def test_sig_amplitude_and_frequency() -> None:
    image = torch.full((1, 1, 2, 4), 100, dtype=torch.uint8)
    out = SIG(delta=30 / 255, freq=1).apply(image)
    assert out[0, 0].tolist() == [[100, 130, 100, 70]] * 2
    assert torch.equal(SIG(delta=0.0).apply(image), image)


def test_sig_errors() -> None:
    with pytest.raises(ValueError, match="SIG: `delta`"):
        SIG(delta=40)
    with pytest.raises(ValueError, match="SIG: `freq`"):
        SIG(freq=-1)


# --- WaNet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 12, 20), (3, 1, 5)])
def test_wanet_train_and_test_share_one_grid(shape: tuple[int, int, int]) -> None:
    images, _ = make_set(6, shape)
    attack = WaNet(grid_seed=3)
    poisoned = attack.apply(images, "poison", seed=0)
    assert torch.equal(poisoned, attack.apply(images, "test", seed=99))
    assert torch.equal(poisoned[2:3], attack.apply(images[2:3], "poison"))


def test_wanet_grid_has_the_stated_strength_and_range() -> None:
    attack = WaNet(grid_seed=0)
    grid = attack.grid(33, 33)
    axis = torch.linspace(-1, 1, 33, dtype=torch.float64)
    shift = (grid - torch.stack((axis.expand(33, 33), axis[:, None].expand(33, 33)), -1)) * 33 / 0.5
    assert grid.abs().max() <= 1
    coarse = shift[8:25:16, 8:25:16]  # not on the 4 x 4 nodes, but inside: bounded by the bicubic overshoot
    assert 0.1 < shift.abs().mean() < 2
    assert coarse.abs().max() < 4
    assert torch.equal(WaNet(grid_seed=0, s=0.0).grid(5, 7)[2, :, 0], torch.linspace(-1, 1, 7, dtype=torch.float64))
    assert torch.equal(WaNet(grid_seed=0, s=0.0).grid(5, 7)[:, 2, 1], torch.linspace(-1, 1, 5, dtype=torch.float64))
    assert torch.equal(WaNet(grid_seed=0, grid_rescale=0.5).grid(9, 9), WaNet(grid_seed=0).grid(9, 9) * 0.5)


def test_wanet_matches_a_bilinear_sampler_written_out() -> None:
    images, _ = make_set(2, (1, 6, 9))
    attack = WaNet(grid_seed=1, s=2.0)
    out = attack.apply(images.to(torch.float64) / 255, quantize=False) * 255
    grid = attack.grid(6, 9).numpy()
    for i in range(6):
        for j in range(9):
            x, y = (grid[i, j, 0] + 1) / 2 * 8, (grid[i, j, 1] + 1) / 2 * 5
            x0, y0 = min(int(x), 7), min(int(y), 4)
            fx, fy = x - x0, y - y0
            p = images[:, 0].double()
            value = (
                p[:, y0, x0] * (1 - fx) * (1 - fy)
                + p[:, y0, x0 + 1] * fx * (1 - fy)
                + p[:, y0 + 1, x0] * (1 - fx) * fy
                + p[:, y0 + 1, x0 + 1] * fx * fy
            )
            torch.testing.assert_close(out[:, 0, i, j], value, rtol=0, atol=1e-9)


def test_wanet_without_strength_is_the_identity() -> None:
    images, _ = make_set(5)
    assert torch.equal(WaNet(s=0.0).apply(images), images)


def test_wanet_covers_have_a_grid_each() -> None:
    images, _ = make_set(1)
    covers = WaNet(grid_seed=0).apply(images.expand(3, -1, -1, -1), "cover", seed=0)
    assert not torch.equal(covers[0], covers[1])
    assert not torch.equal(covers[1], covers[2])
    assert torch.equal(covers, WaNet(grid_seed=0).apply(images.expand(3, -1, -1, -1), "cover", seed=0))


def test_wanet_errors() -> None:
    for option, value in [("s", -1.0), ("grid_rescale", -1.0), ("cover_ratio", -1.0), ("k", 1), ("grid_seed", -1)]:
        with pytest.raises(ValueError, match=f"WaNet: `{option}`"):
            get("wanet", **{option: value})


# --- LF ---------------------------------------------------------------------------------------------------------------


def test_lf_is_smooth_and_additive() -> None:
    v = LF().trigger_image(3, 32, 32)
    assert abs(v.min()) < 1e-12
    assert abs(v.max() - 51) < 1e-12
    position = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    basis = torch.cos(math.pi * position[:, None] * torch.arange(32))
    spectrum = basis.T @ v @ basis  # DCT-II, unnormalised
    spectrum[:, :4, :4] = 0
    assert spectrum.abs().max() < 1e-8
    image = torch.full((1, 3, 32, 32), 230, dtype=torch.uint8)
    assert torch.equal(LF().apply(image)[0], (230 + v + 1e-9).clamp(max=255).floor().to(torch.uint8))


def test_lf_own_pattern() -> None:
    pattern = torch.tensor([[0, 51]], dtype=torch.uint8)
    out = LF(pattern=pattern).apply(torch.full((1, 2, 1, 2), 220, dtype=torch.uint8))
    assert out.tolist() == [[[[220, 255]], [[220, 255]]]]


def test_lf_errors() -> None:
    with pytest.raises(ValueError, match="LF: `pattern` expected 'lf-proc' or an image tensor"):
        LF(pattern="noise")
    with pytest.raises(ValueError, match="LF: `magnitude`"):
        LF(magnitude=51)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("stage", ["poison", "cover", "test"])
def test_float_and_8_bit_images_agree(name: str, stage: str, any_set: tuple[Tensor, Tensor]) -> None:
    images = any_set[0][:8]
    whole = ready(name, any_set[0]).apply(images, stage)  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.float64):
        fraction = ready(name, any_set[0]).apply(images.to(dtype) / 255, stage)  # type: ignore[arg-type]
        assert fraction.dtype == dtype
        assert torch.equal(fraction, whole.to(dtype) / 255)
    assert whole.shape == images.shape
    assert not torch.equal(whole, images)


@pytest.mark.parametrize("name", names())
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = make_set(7)
    whole = [ready(name, images).apply(images, stage) for stage in ("poison", "cover", "test")]  # type: ignore[arg-type]
    monkeypatch.setattr("bdfast.attacks.base.CHUNK_ELEMENTS", 3 * images[0].numel())
    parts = [ready(name, images).apply(images, stage) for stage in ("poison", "cover", "test")]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", names())
def test_inputs_stay_and_memory_layout_is_kept(name: str) -> None:
    images = make_set(4)[0].contiguous(memory_format=torch.channels_last)
    before = images.clone()
    out = ready(name, images).apply(images)
    assert torch.equal(images, before)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, ready(name, before).apply(before.contiguous()))
    doubles = before.double() / 255
    ready(name, before).apply(doubles)
    assert torch.equal(doubles, before.double() / 255)


@pytest.mark.parametrize("name", names())
def test_empty_batches_and_single_pixels(name: str) -> None:
    assert ready(name, black(4, 3, 8, 8)).apply(black(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    if name not in ("adaptive_patch", "badnets", "tact"):  # their patches have at least 3 x 3 pixels
        assert ready(name, black(2, 1, 1, 1)).apply(black(2, 1, 1, 1)).shape == (2, 1, 1, 1)


def test_attacks_compare_by_value() -> None:
    a, b = BadNets(pattern=torch.ones(2, 2)), BadNets(pattern=torch.ones(2, 2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != BadNets(pattern=torch.zeros(2, 2))
    assert a != BadNets()
    assert BadNets() != SIG()
    assert SIG(freq=6) == SIG()


def test_apply_errors() -> None:
    with pytest.raises(ValueError, match=r"sig.apply: `stage` expected one of poison, cover, test, got 'train'"):
        SIG().apply(black(1, 1, 4, 4), "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sig.apply: `quantize` expected True for uint8"):
        SIG().apply(black(1, 1, 4, 4), quantize=False)
    with pytest.raises(TypeError, match=r"sig.apply: `images` expected a tensor"):
        SIG().apply(np.zeros((1, 1, 4, 4)))  # type: ignore[arg-type]


def test_get_errors() -> None:
    with pytest.raises(ValueError, match=r"attacks: `attack` expected one of adaptive_blend, .*wanet, got 'x'"):
        get("x")
    with pytest.raises(TypeError, match=r"attacks.sig: `alpha` expected options among delta, freq"):
        get("sig", alpha=0.1)
