"""Several processes do together what one does: training, measuring, saving, stopping.

torchrun takes seconds to start, so all tests but one fork processes with the variables it sets.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_never_lose_a_run import KILL, RESUME, STEP, at_call, draw_no_curve, fork
from tiny import FLAGS, refused, same, tiny_ddpm
from torch.testing import assert_close

import train_eval
from support import processes
from support.checkpoint import load_checkpoint, load_last

STEPS = 22  # eleven an epoch: ten of 17 images, and one of 1, which is fewer than the processes
# The peak is 1e-4, since AdamW turns rounding into differences as large as the learning rate.
RUN = FLAGS + "--train_size 171 --test_size 100 --batch_size 17 --learning_rate 1e-4".split()
RUN += "--num_timesteps 10 --sample_every 11 --save_every 5 --log_every 1 --num_samples 70".split()
RUN += "--use_augmentation --timestep_sampling importance --variance learned".split()
RUN += "--target_references 50 --guidance_scale 1.5 --bound_images 21".split()
COMPARED = ("train_curve", "test_curve", "fixed_curve", "frechet_curve", "network", "ema", "best")
COMPARED += ("timesteps", "moments")  # the weights hardly show how large gradients were, these do


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def ranks(number):
    """The variables that torchrun sets for each process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(number)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def run(number, folder, *flags, patches=None, extra=None):
    """Status, stdout and stderr of each process; patches and extra flags are {rank: [...]}."""
    calls = []
    for rank, variables in enumerate(ranks(number)):
        argv = [*map(str, flags), *(extra or {}).get(rank, ()), "--save_dir", str(folder)]
        own = [(draw_no_curve,), *(patches or {}).get(rank, ())]
        calls.append((train_eval.main, [argv], own, variables))
    return fork(*calls)


def finish(number, folder, *flags, patches=None):
    """A run that comes to its end."""
    done = run(number, folder, *flags, patches=patches)
    assert [status for status, _, _ in done] == [0] * number, done
    assert all(texts == ["", ""] for _, *texts in done[1:]), "the first alone prints"


def error_lines(err):
    """The errors of a run, a line each."""
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith("train_eval.py: ")]


def write_nothing(folder):
    """From now on the process ends if it opens a file of the run to write."""

    def audit(event, args):
        if event == "open" and str(folder) in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR):
            os._exit(77)

    sys.addaudithook(audit)


@pytest.fixture(scope="module")
def flags(data_flags):
    return [*RUN, *data_flags]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """What one process comes to."""
    folder = tmp_path_factory.mktemp("alone")
    finish(1, folder, *flags)
    return folder


def check_equal(folder, other):
    """Two runs came to the same: curves, weights, averages, generator, pictures."""
    a, b = map(load_last, (folder, other))
    for last, path in ((a, folder), (b, other)):
        last["moments"] = last["optimizer"]["state"]
        last["best"] = load_checkpoint(path / "best_model.pt", ["weights"])["weights"]
    assert a["step"] == b["step"] == len(a["train_curve"]) == STEPS and a.keys() == b.keys()
    assert len(a["test_curve"]) == len(a["frechet_curve"]) == 2
    for name in COMPARED:
        assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert same(a["rng"], b["rng"])
    for name in ("final", "step_0000011", "step_0000022"):
        paths = (path / "samples" / f"{name}.png" for path in (folder, other))
        x, y = (np.array(Image.open(path)).astype(int) for path in paths)
        assert abs(x - y).max() <= 1, name


def test_two_processes_do_what_one_does(alone, flags, tmp_path):
    finish(2, tmp_path, *flags)
    check_equal(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("agents, each", [(1, 3), (2, 1)])
def test_torchrun_with_several_processes_does_what_one_does(alone, flags, tmp_path, agents, each):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={each}"]
    command += [f"--nnodes={agents}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = [train_eval.__file__, *flags, "--save_dir", str(tmp_path)]
    start = partial(subprocess.Popen, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = [start([*command, f"--node_rank={k}", *script]) for k in range(agents)]
    outputs = [agent.communicate(timeout=300)[0] for agent in running]
    assert [agent.returncode for agent in running] == [0] * agents, outputs
    assert [output.count("samples: ") for output in outputs] == [1, 0][:agents], outputs
    check_equal(tmp_path, alone)


@pytest.mark.slow
def test_an_evaluation_by_two_is_that_by_one_and_the_first_alone_writes(alone, tmp_path):
    figures = []
    for number in (1, 2):
        (folder := tmp_path / str(number)).mkdir()
        shutil.copy(alone / "best_model.pt", folder)
        flags = [*"--evaluate --test_size 250 --bound_images 120".split(), *RESUME[1:]]
        finish(number, folder, *flags, patches={1: [(write_nothing, folder)]})
        figures.append(json.loads((folder / "evaluation.json").read_text()))
    one, two = figures
    assert one.keys() == two.keys() and {"test_loss", "bits_per_dim", "frechet"} < one.keys()
    for name in [name for name in one if not isinstance(one[name], (str, type(None)))]:
        assert one[name] == pytest.approx(two[name], rel=1e-3), name


@pytest.mark.slow
def test_a_lost_process_is_one_line_and_another_number_goes_on(alone, flags, tmp_path):
    patches = {1: [(at_call, STEP, 8, KILL)]}
    (status, _, err), (killed, *_) = run(2, tmp_path, *flags, patches=patches)
    (line,) = error_lines(err)
    assert (status, killed) == (1, -KILL) and "another process of the run has ended" in line
    assert "--resume" in line and load_last(tmp_path)["step"] == 5
    finish(1, tmp_path, *RESUME, "--grad_accumulation", 3)  # three parts are the whole, too
    check_equal(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_to_any_process_is_for_all(alone, flags, tmp_path):
    signals = {0: (3, signal.SIGUSR1), 1: (14, signal.SIGTERM), 2: (9, signal.SIGUSR1)}
    patches = {rank: [(at_call, STEP, *when)] for rank, when in signals.items()}
    done = run(3, tmp_path, *flags, patches=patches)
    assert [status for status, _, _ in done] == [143] * 3, done
    assert re.findall("saved at step .*", done[0][2]) == ["saved at step 10"]
    assert "stopped at step 20; everything is saved" in done[0][1]
    assert not any("saved" in text for _, *texts in done[1:] for text in texts)
    nothing = {1: [(write_nothing, tmp_path)]}
    finish(2, tmp_path, *RESUME, "--grad_accumulation", 2, patches=nothing)
    check_equal(tmp_path, alone)


@pytest.mark.parametrize(
    "rank, function, error, status, words",
    [
        (0, "train_eval.RunFolder", ValueError("in use"), 2, "error: in use"),
        (0, "support.checkpoint.save_last", OSError(28, "full"), 1, "full; what was saved before"),
        (1, "train_eval.load_data", ValueError("damaged"), 2, "error: damaged"),
    ],
)
def test_an_error_of_one_process_ends_all(flags, tmp_path, rank, function, error, status, words):
    patch = (at_call, function, 1, error)
    done = run(2, tmp_path, *flags, patches={rank: [patch]})
    assert [end for end, _, _ in done] == [status if k == rank else 1 for k in (0, 1)], done
    lines = [error_lines(err) for _, _, err in done]
    assert [len(found) for found in lines] == [1, 1] and words in lines[rank][0], done
    assert "another process of the run has ended" in lines[1 - rank][0]


def test_processes_with_other_flags_are_told_which(flags, tmp_path):
    done = run(2, tmp_path, *flags, extra={1: ["--learning_rate", "2"]})
    for value, (status, out, err) in zip((1e-4, 2.0), done):
        assert status == 2 and out == "" and err.count("\n") == 1, err
        assert f"differ in learning_rate (here {value})" in err


@pytest.mark.parametrize("n", [1, 2, 3, 7, 17])
def test_shares_and_parts_cover_the_batch_in_order(monkeypatch, n):
    model, losses = torch.nn.Linear(1, 1), torch.rand(n, dtype=torch.float64)
    model.no_sync = nullcontext
    for number, parts in [(1, 3), (2, 1), (3, 2), (5, n)]:
        covered, total = [], 0
        for rank in range(number):
            monkeypatch.setattr(processes, "world", lambda rank=rank, n=number: (rank, n))
            share = range(n)[processes.share(n)]
            assert len(share) == n if n < number else len(share) in (n // number, -(-n // number))
            found = list(processes.micro_batches(model, n, parts))
            sizes = {part.stop - part.start for part, _ in found}
            assert len(found) == min(parts, len(share)) and max(sizes) - min(sizes) <= 1
            covered += [i for part, _ in found for i in range(n)[part]]
            # gradients are averaged over the processes
            total += sum(scale * losses[part].sum() for part, scale in found) / number
        assert covered == list(range(n)) * (number if n < number else 1)
        assert abs(total - losses.mean()) < 1e-12


def noisy(part, seed):
    """What `in_chunks` computes here: numbers that the images and the seed decide."""
    print("chunk", part.start, part.stop)
    noise = torch.rand(part.stop - part.start, 3, generator=torch.Generator().manual_seed(seed))
    return noise + torch.arange(part.start, part.stop)[:, None]


def test_each_chunk_has_a_seed_of_its_own_that_the_run_and_its_place_decide(capsys):
    found = processes.in_chunks(7, 3, noisy, size=2)
    assert capsys.readouterr().out == "chunk 0 2\nchunk 2 4\nchunk 4 6\nchunk 6 7\n"
    assert torch.equal(found.floor()[:, 0], torch.arange(7.0))
    assert torch.equal(found[:4], processes.in_chunks(4, 3, noisy, size=2))
    assert len({tuple(row) for row in found.frac()[::2].tolist()}) == 4
    assert not torch.equal(found, processes.in_chunks(7, 4, noisy, size=2))


def test_chunks_that_will_take_long_are_announced(monkeypatch, capsys):
    now = itertools.count(0, 100)  # each look at the clock takes 100 seconds
    monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    for number, said in ((7, 1), (6, 0)):
        processes.in_chunks(number, 0, lambda part, seed: torch.zeros(1), size=1, advice="less")
        out = capsys.readouterr().out
        assert out.count("this takes about 12 minutes; less\n") == out.count("minutes") == said


def gradients(n, parts):
    """Losses, and the gradients of their weighted mean as a step of training gets them."""
    generator, ddpm = torch.Generator().manual_seed(0), tiny_ddpm()
    x0, eps = torch.randn(2, n, 1, 8, 8, generator=generator)
    t, weights = torch.arange(n), torch.rand(n, generator=generator)
    config = SimpleNamespace(grad_accumulation=parts, bf16=False, device="cpu", use_compile=False)
    model = processes.parallel(ddpm)
    losses = train_eval.backward(config, model, x0, None, t, eps, weights)
    return [losses, *(parameter.grad for parameter in ddpm.parameters())]


def what_each_finds(folder):
    """The parts of a run, in one of several processes; what they give goes into a file."""
    with processes.joined(SimpleNamespace(device="cpu")):
        rank, found = processes.world()[0], {}
        with processes.main_first():
            if rank == 0:
                time.sleep(0.3)
                (folder / "loaded").touch()
            found["loaded"] = (folder / "loaded").exists()
        found["largest"] = processes.largest(3 * rank)
        found["on main"] = processes.on_main(processes.world)()
        found["tolerable"] = processes.tolerable_errors() is OSError
        processes.check_same({"a": 0, "b": 1})
        refused(lambda: processes.check_same({"a": rank, "b": 1}), f"a (here {rank}); expected")
        found["gradients"] = [gradients(n, parts=2) for n in (7, 1)]
        found["chunks"] = processes.in_chunks(7, 3, noisy, size=2)
        torch.manual_seed(5)
        model, masks = processes.parallel(tiny_ddpm()), []
        for _ in range(2):
            torch.rand(1)
            for _ in processes.micro_batches(model, 9, 2):
                masks.append(torch.nn.functional.dropout(torch.ones(99)).tolist())
        found |= {"masks": masks, "generator": torch.get_rng_state()}
        torch.save(found, folder / f"{rank}.pt")


def test_each_process_has_its_share_and_all_come_to_the_whole(tmp_path):
    done = fork(*((what_each_finds, [tmp_path], (), variables) for variables in ranks(2)))
    assert [status for status, _, _ in done] == [0, 0], done
    assert [out for _, out, _ in done] == ["chunk 0 2\nchunk 4 6\n", ""], "others print nothing"
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first.pop("on main"), second.pop("on main")) == ((0, 2), None)
    masks = first.pop("masks") + second.pop("masks")  # dropout of its own for each part
    assert len({tuple(mask) for mask in masks}) == 2 * 2 * 2
    assert same(first, second) and first["loaded"] and first["tolerable"]
    assert first["largest"] == 3
    assert same(first["chunks"], processes.in_chunks(7, 3, noisy, size=2))
    assert_close(first["gradients"], [gradients(n, parts=1) for n in (7, 1)])


def test_gpus_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(WORLD_SIZE="2", MASTER_ADDR="here", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    for device in ("cuda", "cuda:0"):
        words = f"device '{device}' for process 2 of this machine, which has 1 GPUs: expected"
        refused(partial(processes.check_device, device), words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(processes.checks, "device", asked.append)
    for nccl, words in ((False, "needs NCCL"), (True, None)):
        monkeypatch.setattr(processes.dist, "is_nccl_available", lambda nccl=nccl: nccl)
        call = partial(processes.check_device, "cuda")
        refused(call, "device 'cuda'", words) if words else call()
    assert asked == [1, "cuda"], "each opens its own card first"
