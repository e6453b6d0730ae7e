"""Other libraries on Fashion-MNIST for a budget of CPU time: `python benchmarks/quality/peers.py --name NAME`.

Each library's own network, loss, average and DDIM sampler, in the loop of its example, with one thread. What is killed
goes on where it stopped, with what it had used of its budget; more samples can be asked for later.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "training")]

import torch  # noqa: E402
from common import machine  # noqa: E402
from loops import EXAMPLE_ADAMW, EXAMPLE_EMA, EXAMPLE_NET  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import mse_loss, pad  # noqa: E402

CLASSES, SIDE = 10, 28
SAVE = 120.0  # CPU seconds between two saved states
STEPS = 50  # of DDIM
CHUNK = 100  # samples drawn at once
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A library's network by name, its learning rate and batch, and the format that is faster on this processor."""

    library: str
    net: str
    rate: float
    batch: int
    precision: str = "bf16"
    layout: str = "contiguous_format"

    @property
    def side(self) -> int:
        """The default networks halve more often than 28 allows, so that their pictures are padded."""
        return 32 if self.net == "default" else SIDE


SETTINGS = {
    "diffusers-small": Setting("diffusers", "small", 1e-4, 16),
    "diffusers-small-1e-3": Setting("diffusers", "small", 1e-3, 16),
    "diffusers-default": Setting("diffusers", "default", 1e-4, 16),
    "lucidrains-small": Setting("lucidrains", "small", 8e-5, 16, layout="channels_last"),
    "lucidrains-small-1e-3": Setting("lucidrains", "small", 1e-3, 16, layout="channels_last"),
    "lucidrains-default": Setting("lucidrains", "default", 8e-5, 16, layout="channels_last"),
}


class Diffusers:
    """UNet2DModel in the loop of examples/unconditional_image_generation; a tenth of the labels is the null class."""

    packages = ("diffusers",)

    def __init__(self, setting: Setting) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        small = {
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        }
        net = EXAMPLE_NET if setting.net == "default" else small
        size = {"sample_size": setting.side, "in_channels": 1, "out_channels": 1, "num_class_embeds": CLASSES + 1}
        self.net = UNet2DModel(**net, **size).to(memory_format=getattr(torch, setting.layout))
        self.noise = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=setting.rate, fused=True, **EXAMPLE_ADAMW)
        self.ema = EMAModel(self.net.parameters(), foreach=True, **EXAMPLE_EMA)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean squared error of the noise, for x in [-1, 1]."""
        labels = torch.where(torch.rand(len(x)) < 0.1, CLASSES, labels)
        eps, t = torch.randn_like(x), torch.randint(0, self.noise.config.num_train_timesteps, (len(x),))
        return mse_loss(self.net(self.noise.add_noise(x, eps, t), t, class_labels=labels).sample.float(), eps)

    def rate(self, step: int, total: float) -> float:
        """The example's `cosine` of its own learning rate, with 500 steps of warmup."""
        if step < 500:
            return step / 500
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 500) / max(1.0, total - 500))))

    def average(self) -> None:
        self.ema.step(self.net.parameters())

    def averaged(self) -> nn.Module:
        """The network with the average of its weights."""
        self.ema.copy_to(self.net.parameters())
        return self.net.eval()

    def sample(self, labels: Tensor, w: float) -> Tensor:
        """`DDIMScheduler` with its defaults, in the loop of `DDIMPipeline`, which knows no labels."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(self.noise.config)
        ddim.set_timesteps(STEPS)
        both = torch.cat([labels, torch.full_like(labels, CLASSES)]) if w != 1 else labels
        x = torch.randn(len(labels), 1, *2 * (self.net.config.sample_size,))
        for t in ddim.timesteps:
            eps = self.net(x.repeat(len(both) // len(x), 1, 1, 1), t, class_labels=both).sample
            if w != 1:
                given, null = eps.chunk(2)
                eps = null + w * (given - null)
            x = ddim.step(eps, t, x).prev_sample
        return x


class Lucidrains:
    """Unet and GaussianDiffusion of classifier_free_guidance in the loop of `Trainer`, which knows no labels."""

    packages = ("denoising-diffusion-pytorch", "ema-pytorch")

    def __init__(self, setting: Setting) -> None:
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        class PlainUnet(Unet):
            """Guided by the whole difference, without removing its part along the prediction as 2.3.4 does.

            At scale 1, 2.3.4 gives one tensor where its GaussianDiffusion unpacks two.
            """

            def forward_with_cond_scale(self, *args: Any, cond_scale: float, rescaled_phi: float) -> Any:
                if cond_scale == 1:
                    return 2 * (self(*args, cond_drop_prob=0.0),)
                guidance = {"cond_scale": cond_scale, "rescaled_phi": rescaled_phi, "remove_parallel_component": False}
                return super().forward_with_cond_scale(*args, **guidance)

        small = setting.net == "small"
        net = PlainUnet(24 if small else 64, CLASSES, dim_mults=(1, 2, 4) if small else (1, 2, 4, 8), channels=1)
        self.net = net.to(memory_format=getattr(torch, setting.layout))
        ddim = {"sampling_timesteps": STEPS, "ddim_sampling_eta": 0.0}  # its default 1.0 would be ancestral
        self.diffusion = GaussianDiffusion(net, image_size=setting.side, **ddim)
        self.optimiser = torch.optim.Adam(net.parameters(), lr=setting.rate, betas=(0.9, 0.99), fused=True)
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10, use_foreach=True)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """`GaussianDiffusion` called with pictures in [0, 1], for x in [-1, 1]."""
        return self.diffusion(x / 2 + 0.5, classes=labels)

    def rate(self, step: int, total: float) -> float:
        """Constant."""
        return 1.0

    def average(self) -> None:
        self.ema.update()

    def averaged(self) -> nn.Module:
        """The network with the average of its weights."""
        return self.ema.ema_model.eval().model

    def sample(self, labels: Tensor, w: float) -> Tensor:
        """Its own `sample`: DDIM where `sampling_timesteps` are fewer than 1000."""
        return self.ema.ema_model.sample(labels, cond_scale=w, rescaled_phi=0.0) * 2 - 1


class Fashion:
    """The 60,000 training pictures in memory, padded to `side`, in an order that is a function of the step."""

    def __init__(self, side: int, batch: int) -> None:
        from undiffuse.data import materialise, open_source

        data = materialise(open_source("fashion-mnist"))
        self.x, self.labels = pad(data.x, 4 * ((side - SIDE) // 2,), value=-1.0), data.labels
        self.batch, self.each = batch, len(data.x) // batch
        self.epoch, self.order = -1, torch.empty(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """A batch of pictures in [-1, 1] and their labels."""
        epoch, k = divmod(step, self.each)
        if epoch != self.epoch:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
            self.epoch, self.order = epoch, order
        rows = self.order[k * self.batch : (k + 1) * self.batch]
        return self.x[rows], self.labels[rows]


class Run:
    """A peer in its folder: `train` within the budget, then `draw`."""

    def __init__(self, name: str, seconds: float, folder: Path) -> None:
        torch.manual_seed(0)
        self.name, self.setting, self.seconds, self.folder = name, SETTINGS[name], seconds, folder
        self.peer = {"diffusers": Diffusers, "lucidrains": Lucidrains}[self.setting.library](self.setting)
        self.step, self.cpu, self.wall = 0, 0.0, 0.0

    def save(self) -> None:
        """Everything that the next step depends on, replacing the file at once."""
        peer = self.peer
        parts = {"net": peer.net.state_dict(), "optimiser": peer.optimiser.state_dict(), "ema": peer.ema.state_dict()}
        state = {"step": self.step, "cpu": self.cpu, "wall": self.wall, "rng": torch.get_rng_state(), **parts}
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def load(self) -> None:
        """Go on from the saved state, where there is one."""
        if not (self.folder / "state.pt").exists():
            return
        state = torch.load(self.folder / "state.pt")
        self.step, self.cpu, self.wall = state["step"], state["cpu"], state["wall"]
        for part in ("net", "optimiser", "ema"):
            getattr(self.peer, part).load_state_dict(state[part])
        torch.set_rng_state(state["rng"])

    def train(self) -> None:
        """Steps until the budget is used up; only they count."""
        data = Fashion(self.setting.side, self.setting.batch)
        while self.cpu < self.seconds:
            before, losses = (self.cpu, self.wall, self.step), list[float]()
            cpu, wall = time.process_time(), time.perf_counter()
            while self.cpu < min(self.seconds, before[0] + SAVE):
                losses.append(self.advance(*data.at(self.step)))
                self.cpu, self.wall = before[0] + time.process_time() - cpu, before[1] + time.perf_counter() - wall
            self.save()
            speed = (self.step - before[2]) * self.setting.batch / (self.cpu - before[0])
            loss = sum(losses) / len(losses)
            print(f"{self.name}: {self.cpu:.0f} s, step {self.step}, loss {loss:.4f}, {speed:.1f}/s", flush=True)

    def advance(self, x: Tensor, labels: Tensor) -> float:
        """One step of the peer's loop; the number of steps to come follows from the speed so far."""
        peer = self.peer
        rate = self.setting.rate * peer.rate(self.step, self.step * self.seconds / max(self.cpu, 1e-9))
        for group in peer.optimiser.param_groups:
            group["lr"] = rate
        peer.net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.precision == "bf16"):
            loss = peer.loss(x, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(peer.net.parameters(), 1.0)
        peer.optimiser.step()
        peer.optimiser.zero_grad()
        peer.average()
        self.step += 1
        return loss.item()

    def draw(self, w: int, count: int) -> float:
        """Go on with samples-wW.npz to `count` samples at guidance w, labels i % 10; CPU seconds of a sample."""
        import numpy as np

        path, margin = self.folder / f"samples-w{w}.npz", (self.setting.side - SIDE) // 2
        x, spent = torch.empty(0, 1, SIDE, SIDE), 0.0
        if path.exists():
            with np.load(path) as known:
                x, spent = torch.from_numpy(known["x"]), float(known["seconds"])
        while len(x) < count:
            labels, start = torch.arange(len(x), min(count, len(x) + CHUNK)) % CLASSES, time.process_time()
            torch.manual_seed(len(x))
            with torch.no_grad():  # in float32, as both libraries sample
                new = self.peer.sample(labels, w).clamp(-1, 1)
            x = torch.cat([x, new[..., margin : margin + SIDE, margin : margin + SIDE]])
            spent += time.process_time() - start
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.savez(file, x=x.numpy(), labels=(torch.arange(len(x)) % CLASSES).numpy(), seconds=spent)
            path.with_suffix(".tmp").replace(path)
            print(f"{self.name}: w = {w}, {len(x)} samples, {spent / len(x):.3f} s each", flush=True)
        return spent / len(x)

    def finish(self) -> None:
        """Keep the averaged network and what was trained, how long and by what."""
        torch.save(self.peer.averaged().state_dict(), self.folder / "model.pt")
        self.note(
            name=self.name,
            **asdict(self.setting),
            parameters=sum(p.numel() for p in self.peer.net.parameters()),
            steps=self.step,
            cpu_seconds=self.cpu,
            wall_seconds=self.wall,
            sampler=f"DDIM, {STEPS} steps, eta 0, float32",
            seconds_per_sample={},
            versions={name: version(name) for name in ("torch", *self.peer.packages)},
            machine=machine(),
        )
        (self.folder / "state.pt").unlink()

    def note(self, **entries: Any) -> None:
        """Add entries to info.json."""
        path = self.folder / "info.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | entries, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=SETTINGS, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="CPU seconds of training")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--count", type=int, default=2000, help="samples for each guidance")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out / "peers" / f"{options.name}-{options.seconds:g}"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(options.name, options.seconds, folder)
    if not (folder / "info.json").exists():
        run.load()
        run.train()
        run.finish()
    run.peer.averaged().load_state_dict(torch.load(folder / "model.pt"))
    run.note(seconds_per_sample={f"w{w}": run.draw(w, options.count) for w in (1, 2)})
    print(f"{options.name}: finished in {folder}", flush=True)


if __name__ == "__main__":
    main()
