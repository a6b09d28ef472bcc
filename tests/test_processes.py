"""Several processes do together what one does: training, measuring, saving, stopping.

A helper has imported the script and forks processes with the variables that torchrun sets. torchrun itself takes ten
seconds a start, so only one test uses it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import DDPM
from support import machine

ROOT = Path(__file__).parent.parent
STEPS = 22  # eleven in an epoch: ten batches of 17 images, and one of 1, which is fewer than the processes
# AdamW divides each gradient by its own size, rounding included: with a peak of 1e-3 weights differ by up to 8e-4 after
# 30 steps. So the peak is 1e-4 here.
FLAGS = (
    "--device cpu --no-bf16 --train_size 171 --test_size 100 --base_channels 32 --channel_mult 1 "
    "--num_res_blocks 1 --time_emb_dim 32 --patch_size 4 --attention_resolutions none --batch_size 17 --epochs "
    "2 --sample_steps 3 --preview_steps 3 --num_samples 20 --log_every 1 --sample_every 11 --save_every 5 "
    "--learning_rate 1e-4 --num_timesteps 10 --no-use_conditional_generation --sampler ddpm --guidance_scale 1 "
    "--target_references 0 --num_clusters 8 --eval_samples 90 --bound_images 21 --bound_terms 4 "
    "--grad_clip 0"
).split()
ALL = (
    "--use_conditional_generation --num_clusters 0 --use_augmentation --timestep_sampling importance "
    "--target_references 50 --variance learned --guidance_scale 1.5 --num_samples 70 "
    "--grad_clip 1"
).split()  # what draws or needs all
TOLERANCE = 1e-4
# The helper: each line on stdin is a list of processes to fork, [environment, argv, stdout and stderr, code, signal].
HELPER = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
import matplotlib.pyplot, torch._dynamo, torch.nn.parallel, torch.utils.tensorboard, torchvision.utils
import train_eval

def child(environment, argv, files, code, kill):
    for number, file in zip((0, 1, 2), (os.devnull, *files)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.update(environment)
    signal.alarm(300)  # so that no test waits forever
    if kill:
        steps, step = iter(range(1, 10**9)), train_eval.train_step
        train_eval.train_step = lambda *args: (next(steps) == kill[0] and os.kill(os.getpid(), kill[1]), step(*args))[1]
    exec(code, {})
    sys.exit(train_eval.main(argv) if argv else 0)

for line in sys.stdin:
    pids = []
    for process in json.loads(line):
        pids.append(os.fork())
        if not pids[-1]:
            child(*process)
    for pid in pids:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """Starts the processes of a run and waits for them, with a helper that lives as long as this is open."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        self.helper = subprocess.Popen(
            [sys.executable, "-c", HELPER],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, number, *flags, code="", kill=None, extra=None):
        """Status, stdout, stderr of each. `kill` is {rank: (step, signal)}, `extra` {rank: flags}; `code` is first."""
        self.number, ranks = self.number + 1, []
        shared = {
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for rank in range(number):
            files = [str(self.folder / f"{self.number}.{rank}.{name}") for name in ("out", "err")]
            environment = (
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
            )
            argv = [str(flag) for flag in (*flags, *(extra or {}).get(rank, ()))]
            ranks.append((environment, argv, files, code, (kill or {}).get(rank)))
        print(json.dumps(ranks), file=self.helper.stdin, flush=True)
        statuses = [int(self.helper.stdout.readline()) for _ in ranks]
        return [
            (status, *(Path(file).read_text() for file in rank[2]))
            for status, rank in zip(statuses, ranks)
        ]

    def train(self, number, save_dir, *flags):
        """The same for a run that reaches its end."""
        done = self.run(number, *flags, "--save_dir", save_dir)
        assert [status for status, _, _ in done] == [0] * number, "\n".join(
            err for _, _, err in done
        )
        return done


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("console"))
    yield processes
    processes.helper.stdin.close()
    processes.helper.wait(60)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory, data_flags):
    """What one process comes to, plain and with everything: {name: (folder, flags)}; the second has a classifier."""
    runs = {
        name: (tmp_path_factory.mktemp(name), [*FLAGS, *data_flags, *options])
        for name, options in (("plain", ()), ("all", ALL))
    }
    for folder, flags in runs.values():
        start.train(1, folder, *flags)
    return runs


def state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def values(tree):
    """All numbers in a checkpoint, as one vector."""
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree, key=str)]
    if isinstance(tree, (list, tuple)):
        return torch.cat([torch.zeros(0).double(), *map(values, tree)])
    return torch.as_tensor(tree).double().flatten()


def difference(folder, other, name="final"):
    """The largest difference between two runs' pictures of this name, in grey levels."""
    a, b = (
        np.array(Image.open(path / "samples" / f"{name}.png")).astype(int)
        for path in (folder, other)
    )
    return abs(a - b).max()


def assert_equal(folder, other):
    """Two runs came to the same: curves, weights, averages, state of the generator, pictures."""
    a, b = state(folder), state(other)
    for last in (a, b):  # the weights hardly show how large gradients were, these do
        last["moments"] = {
            number: moments["exp_avg"] for number, moments in last["optimizer"]["state"].items()
        }
    found = {
        name: (values(a[name]) - values(b[name])).abs().max().item()
        for name in ("train_curve", "test_curve", "network", "ema", "moments", "timesteps")
        if a[name]
    }
    assert (
        a["step"] == b["step"] == STEPS
        and len(a["train_curve"]) == STEPS
        and len(a["test_curve"]) == 2
    )
    assert max(found.values()) < TOLERANCE, found
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"]) and a.keys() == b.keys()
    assert all(
        difference(folder, other, name) <= 1 for name in ("final", "step_0000011", "step_0000022")
    )
    a, b = (DDPM.load(path / "best_model.pt", "cpu") for path in (folder, other))
    assert (values(a.state_dict()) - values(b.state_dict())).abs().max() < TOLERANCE


@pytest.mark.parametrize("number, name", [(3, "all")])
def test_processes_do_what_one_does(start, alone, tmp_path, number, name):
    folder, flags = alone[name]
    (_, out, _), *others = start.train(number, tmp_path, *flags)
    assert_equal(tmp_path, folder)
    assert (
        "samples: " in out
        and "test loss " in out
        and all(text == "" for _, *texts in others for text in texts)
    )
    logs, logs_alone = (list(where.rglob("events.*")) for where in (tmp_path, folder))
    assert len(logs) == len(logs_alone) == 6  # of the training, its four parts, the last grid


@pytest.mark.parametrize("number, parts", [(1, 3), (2, 2)])
def test_a_batch_in_parts_is_the_whole_batch(start, alone, tmp_path, number, parts):
    folder, flags = alone["all" if number > 1 else "plain"]
    start.train(number, tmp_path, *flags, "--grad_accumulation", parts)
    assert_equal(tmp_path, folder)


def numbers(figures):
    """The numbers of an evaluation, lists taken apart."""
    lists = (value if isinstance(value, list) else [value] for value in figures.values())
    return [value for values in lists for value in values if isinstance(value, (int, float))]


def test_a_folder_is_measured_as_by_one_process(start, alone, tmp_path):
    folder, flags = alone["all"]
    figures = []
    for number in (1, 2):
        here = tmp_path / str(number)
        here.mkdir()
        shutil.copy(folder / "best_model.pt", here)
        done = start.run(number, "--evaluate", "--save_dir", here, "--device", "cpu", "--no-bf16")
        assert [status for status, _, _ in done] == [0] * number, done
        assert "bits per dimension" in done[0][1] and all(out == "" for _, out, _ in done[1:])
        figures.append(json.loads((here / "evaluation.json").read_text()))
    one, two = figures
    assert one.keys() == two.keys() and len(numbers(one)) > 30
    assert numbers(one) == pytest.approx(numbers(two), rel=1e-3)
    assert difference(tmp_path / "1", tmp_path / "2") <= 1


@pytest.mark.parametrize(
    "name, number, kill, statuses, saved, then",
    [
        ("all", 3, {1: (8, signal.SIGKILL)}, [1, -signal.SIGKILL, 1], 5, 1),
        (
            "plain",
            3,
            {0: (3, signal.SIGUSR1), 1: (9, signal.SIGTERM), 2: (6, signal.SIGUSR1)},
            [143] * 3,
            9,
            2,
        ),
    ],
)
def test_a_stopped_run_goes_on_with_another_number(
    start, alone, tmp_path, name, number, kill, statuses, saved, then
):
    folder, flags = alone[name]
    done = start.run(number, *flags, "--save_dir", tmp_path, kill=kill)
    assert [status for status, _, _ in done] == statuses and not any(
        "Traceback" in err for _, _, err in done
    ), done
    for _, _, err in [process for process in done if process[0] == 1]:
        (line,) = [line for line in err.splitlines() if line.startswith("train_eval.py: ")]
        assert "another process of the run has ended" in line and "--resume" in line
    assert state(tmp_path)["step"] == saved
    assert done[0][2].count("saved at step") == [signum for _, signum in kill.values()].count(
        signal.SIGUSR1
    )
    start.train(then, tmp_path, "--resume", "--device", "cpu", "--no-bf16")
    assert_equal(tmp_path, folder)


@pytest.mark.parametrize("name", ["learning_rate", "grad_accumulation"])
def test_processes_with_other_flags_are_told_which(start, alone, tmp_path, name):
    for status, out, err in start.run(
        2, *alone["plain"][1], "--save_dir", tmp_path, extra={1: [f"--{name}", 2]}
    ):
        assert (
            status == 2 and out == "" and err.count("\n") == 1 and f"differ in {name} (here " in err
        ), err


def test_a_flag_that_one_of_them_refuses_ends_all(start, alone, tmp_path):
    done = start.run(2, *alone["plain"][1], "--save_dir", tmp_path, extra={1: ["--channels", "2"]})
    assert done[1][0] == 2 and "channels 2" in done[1][2] and done[0][0] == 1, done
    assert [err.count("\n") for _, _, err in done] == [1, 1], done


def test_gpus_that_are_not_there_are_refused_in_one_line(start, alone, tmp_path):
    code = (
        "import torch; torch.cuda.device_count, torch.cuda.is_available = lambda: 0, lambda: False"
    )
    for status, out, err in start.run(
        2, *alone["plain"][1], "--device", "cuda", "--save_dir", tmp_path, code=code
    ):
        assert status == 2 and out == "" and err.count("\n") == 1 and "which has 0 GPUs" in err, err


MASKS = """
import torch
from types import SimpleNamespace
from support import machine
torch.manual_seed(5)
config, masks = SimpleNamespace(device="cpu"), []
with machine.processes(config):
    model = machine.parallel(config, torch.nn.Linear(1, 1))
    for step in range(2):
        torch.rand(1)
        masks += [torch.nn.functional.dropout(torch.ones(99)) for _ in machine.micro_batches(model, 9, 2)]
    images = torch.arange(7.)[:, None] * torch.ones(3)
    whole, single = machine.gather(images[machine.share(7)], 7), machine.gather(images[:1], 1)
    print("here", flush=True)
    torch.save([masks, torch.get_rng_state(), images, whole, single], f"FOLDER/{machine.world()[0]}")
"""


def test_each_process_drops_out_its_own_and_all_go_on_alike(start, tmp_path):
    done = start.run(3, code=MASKS.replace("FOLDER", str(tmp_path)))
    assert [status for status, _, _ in done] == [0] * 3, done
    assert [out for _, out, _ in done] == ["here\n", "", ""]
    found = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    masks = {tuple(mask.tolist()) for masks, *_ in found for mask in masks}
    assert len(masks) == 3 * 2 * 2
    for _, rng, images, whole, single in found:
        assert (
            torch.equal(rng, found[0][1])
            and torch.equal(whole, images)
            and torch.equal(single, images[:1])
        )


@pytest.mark.parametrize("n", [1, 2, 3, 7, 17])
def test_shares_and_parts_cover_the_batch_in_order(monkeypatch, n):
    model, losses = torch.nn.Linear(1, 1), torch.rand(n, dtype=torch.float64)
    model.no_sync = machine.nullcontext
    for number in (1, 2, 3, 5):
        for parts in (1, 2, 3, n):
            covered, total = [], 0
            for rank in range(number):
                monkeypatch.setattr(
                    machine, "world", lambda rank=rank, number=number: (rank, number)
                )
                share = range(n)[machine.share(n)]
                assert (
                    len(share) == n if n < number else len(share) in (n // number, -(-n // number))
                )
                found = list(machine.micro_batches(model, n, parts))
                sizes = {rows.stop - rows.start for rows, _ in found}
                assert len(found) == min(parts, len(share)) and max(sizes) - min(sizes) <= 1
                covered += [i for rows, _ in found for i in range(n)[rows]]
                total += (
                    sum(scale * losses[rows].sum() for rows, scale in found) / number
                )  # the mean of gradients
            assert covered == list(range(n)) * (number if n < number else 1)
            assert abs(total - losses.mean()) < 1e-12


def test_two_machines_of_torchrun(alone, tmp_path):
    folder, flags = alone["all"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    script = [str(ROOT / "train_eval.py"), *flags, "--save_dir", str(tmp_path)]
    agents = [
        subprocess.Popen(
            [*command, f"--node_rank={k}", *script],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for k in (0, 1)
    ]
    out = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], out
    assert "samples: " in out[0] and "samples: " not in out[1]
    assert_equal(tmp_path, folder)
