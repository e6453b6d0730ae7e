"""The four training loops under measurement; each is a network and `advance(n)`, which trains n more steps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

MULTS, DEPTH, IMAGES = (1, 2, 2), 2, 4096
WIDTHS = {28: 32, 32: 48}  # by side


@dataclass(frozen=True)
class Cell:
    """One measurement: a library at one shape, `net` matched or its own default, and one precision."""

    library: str
    side: int
    channels: int
    net: str
    precision: str
    batch: int = 32

    @property
    def width(self) -> int:
        return WIDTHS[self.side]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    @property
    def name(self) -> str:
        return f"{self.library} {self.side}x{self.side}x{self.channels} {self.net} {self.precision}"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 around what is inside, or nothing."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()


@dataclass(frozen=True)
class Loop:
    """`net(x, time)` gives a tensor, whatever the library returns; `advance(n)` trains n steps."""

    net: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    advance: Callable[[int], object]


def images(cell: Cell) -> Tensor:
    """Smooth images in [0, 1], the same for every library."""
    small = torch.rand(IMAGES, cell.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return interpolate(small, (cell.side, cell.side), mode="bicubic").clamp(0, 1)


def folder(cell: Cell, root: Path) -> Path:
    """The same images as PNG files, which are written once."""
    from torchvision.transforms.functional import to_pil_image

    path = root / f"{cell.side}x{cell.side}x{cell.channels}"
    if not (path / f"{IMAGES - 1:05}.png").exists():
        path.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images(cell)):
            to_pil_image(image).save(path / f"{i:05}.png")
    return path


def steps_of(states: Iterator[object]) -> Callable[[int], object]:
    """`advance` of a loop written as a generator that yields after every step."""
    return lambda n: [None for _ in itertools.islice(states, n)]


def in_memory(cell: Cell) -> Iterator[Tensor]:
    """Shuffled batches in [-1, 1] from a tensor, by torch's own loader, without end."""
    data = torch.utils.data.TensorDataset(images(cell) * 2 - 1)
    loader = torch.utils.data.DataLoader(data, batch_size=cell.batch, shuffle=True, drop_last=True)
    while True:
        for (x,) in loader:
            yield x


def image_folder(cell: Cell, root: Path, key: str, workers: int, transform: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Shuffled batches of PNG files by `datasets` and torch's loader, as the example and the tutorial read theirs."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    data = load_dataset("imagefolder", data_dir=str(folder(cell, root)), split="train")
    data.set_transform(lambda rows: {key: [transform(image.convert("RGB")) for image in rows["image"]]})
    loader = torch.utils.data.DataLoader(data, batch_size=cell.batch, shuffle=True, drop_last=True, num_workers=workers)
    while True:
        for rows in loader:
            yield rows[key]


# ours


def our_net(cell: Cell) -> nn.Module:
    """The matched network, or the one that the configuration gives by default."""
    from undiffuse.config import Config
    from undiffuse.nets import UNet

    if cell.net == "default":
        return Config.resolve().build("net", channels=cell.channels, dims=2)
    return UNet(cell.channels, width=cell.width, mults=MULTS, depth=DEPTH)


def our_states(model: nn.Module, cell: Cell) -> Iterator[object]:
    """The states of `train` on a tensor; in bf16 by the plan's own setting where there is one."""
    from undiffuse import VP
    from undiffuse.train import Objective, Plan, train

    own = any(f.name == "precision" for f in dataclasses.fields(Plan))
    options = {"precision": cell.precision} if own else {}
    plan = Plan(steps=10**6, batch=cell.batch, every=0, **options)
    states = train(model, images(cell) * 2 - 1, Objective(VP()), plan)
    while True:
        with contextlib.nullcontext() if own else cell.autocast():
            state = next(states)
        yield state


def ours(cell: Cell, root: Path) -> Loop:
    """`undiffuse.train.train` as it is."""
    from undiffuse import Denoiser, EDMPrecond

    model = Denoiser(our_net(cell), EDMPrecond())
    return Loop(model.net, model.net, steps_of(our_states(model, cell)))


# diffusers, examples/unconditional_image_generation

EXAMPLE_NET = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
EXAMPLE_ADAMW = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
EXAMPLE_EMA = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}


def diffusers_net(cell: Cell) -> nn.Module:
    """UNet2DModel with our widths, depth and attention, or the network that the example trains by default."""
    from diffusers import UNet2DModel

    if cell.net == "default":
        return UNet2DModel(sample_size=cell.side, in_channels=cell.channels, out_channels=cell.channels, **EXAMPLE_NET)
    groups = cell.width // 16
    return UNet2DModel(
        sample_size=cell.side,
        in_channels=cell.channels,
        out_channels=cell.channels,
        block_out_channels=[cell.width * m for m in MULTS],
        layers_per_block=DEPTH,
        down_block_types=("DownBlock2D",) * len(MULTS),
        up_block_types=("UpBlock2D",) * len(MULTS),
        attention_head_dim=32,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
    )


def diffusers_batches(cell: Cell, root: Path) -> Iterator[Tensor]:
    """From memory for the matched network; as shipped from an image folder, in the training process."""
    from torchvision import transforms

    if cell.net == "matched":
        return in_memory(cell)
    augment = transforms.Compose(
        [
            transforms.Resize(cell.side, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomCrop(cell.side),
            transforms.Lambda(lambda x: x),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    return image_folder(cell, root, "input", 0, augment)


def diffusers_states(model: nn.Module, cell: Cell, root: Path) -> Iterator[None]:
    """The example's loop with its default settings and --use_ema: accelerate, AdamW, cosine rate, clip 1.0, EMA."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    accelerator = Accelerator(mixed_precision="bf16" if cell.precision == "bf16" else "no", cpu=True)
    ema = EMAModel(model.parameters(), **EXAMPLE_EMA)
    noise = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, **EXAMPLE_ADAMW)
    rate = get_scheduler("cosine", optimizer=optimiser, num_warmup_steps=500, num_training_steps=10**6)
    model, optimiser, rate = accelerator.prepare(model, optimiser, rate)
    dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
    bar = tqdm(total=10**6)
    for step, batch in enumerate(diffusers_batches(cell, root)):
        model.train()
        clean = batch.to(dtype)
        eps = torch.randn(clean.shape, dtype=dtype)
        t = torch.randint(0, noise.config.num_train_timesteps, (len(clean),)).long()
        noisy = noise.add_noise(clean, eps, t)
        with accelerator.accumulate(model):
            loss = mse_loss(model(noisy, t).sample.float(), eps.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
        ema.step(model.parameters())
        bar.update(1)
        logs = {"loss": loss.detach().item(), "lr": rate.get_last_lr()[0], "step": step, "ema": ema.cur_decay_value}
        bar.set_postfix(**logs)
        accelerator.log(logs, step=step)
        yield


def diffusers(cell: Cell, root: Path) -> Loop:
    """UNet2DModel in the example's loop."""
    net = diffusers_net(cell)
    return Loop(net, lambda x, t: net(x, t).sample, steps_of(diffusers_states(net, cell, root)))


# lucidrains, denoising-diffusion-pytorch


def lucidrains_trainer(net: nn.Module, cell: Cell, root: Path) -> object:
    """Its Trainer; for the matched network fed from memory, with the average updated at every step as ours is."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    matched = cell.net == "matched"
    trainer = Trainer(
        GaussianDiffusion(net, image_size=cell.side),
        str(folder(cell, root)),
        train_batch_size=cell.batch,
        train_num_steps=0,
        amp=cell.precision == "bf16",
        mixed_precision_type="bf16",
        calculate_fid=False,
        save_and_sample_every=10**9,
        results_folder=str(root / "lucidrains"),
        **({"ema_update_every": 1} if matched else {}),
    )
    if matched:
        trainer.dl = (x / 2 + 0.5 for x in in_memory(cell))
    return trainer


def lucidrains(cell: Cell, root: Path) -> Loop:
    """Unet in GaussianDiffusion in Trainer; the readme's network by default."""
    from denoising_diffusion_pytorch import Unet

    if cell.net == "default":
        net = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=cell.channels, flash_attn=True)
    else:
        net = Unet(dim=cell.width, dim_mults=MULTS, channels=cell.channels)
    trainer = lucidrains_trainer(net, cell, root)

    def advance(n: int) -> None:
        trainer.train_num_steps += n
        trainer.train()

    return Loop(net, net, advance)


# azula


class AzulaNet(nn.Module):
    """azula's UNet with the time embedding of its MNIST tutorial."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        from azula.nn.unet import UNet

        features, c = (64 if cell.net == "default" else 4 * cell.width), cell.channels
        if cell.net == "default":
            self.unet = UNet(c, c, mod_features=features)
        else:
            widths = [cell.width * m for m in MULTS]
            blocks = [DEPTH] * (len(MULTS) - 1) + [DEPTH + 1]
            groups = cell.width // 16
            self.unet = UNet(
                c, c, hid_channels=widths, hid_blocks=blocks, mod_features=features, norm="group", groups=groups
            )
        self.time = nn.Sequential(nn.Linear(1, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.unet(x, self.time(time[..., None]))


def azula_batches(cell: Cell, root: Path) -> Iterator[Tensor]:
    """From memory for the matched network; as in the tutorial by `datasets`, in two processes."""
    from torchvision.transforms.functional import to_tensor

    if cell.net == "matched":
        return in_memory(cell)
    return (2 * x - 1 for x in image_folder(cell, root, "image", 2, to_tensor))


def azula_states(net: nn.Module, cell: Cell, root: Path) -> Iterator[None]:
    """The tutorial's loop: Adam, the denoiser's own loss, no clipping; the average only where ours has one, too."""
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    denoiser = KarrasDenoiser(backbone=net, schedule=VPSchedule())
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=3e-4)
    averaged = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.999)) if cell.net == "matched" else None
    losses = []
    for x in azula_batches(cell, root):
        with cell.autocast():
            loss = denoiser.loss(x, torch.rand(len(x)))
        loss.backward()
        losses.append(loss.detach())
        optimiser.step()
        optimiser.zero_grad()
        if averaged is not None:
            averaged.update_parameters(denoiser)
        yield


def azula(cell: Cell, root: Path) -> Loop:
    """UNet in KarrasDenoiser in the tutorial's loop."""
    net = AzulaNet(cell)
    return Loop(net, net, steps_of(azula_states(net, cell, root)))


LIBRARIES: dict[str, Callable[[Cell, Path], Loop]] = {
    "ours": ours,
    "diffusers": diffusers,
    "lucidrains": lucidrains,
    "azula": azula,
}
