"""The command line as people use it, on the demo model: what it prints, as text and as JSON."""

import json
import math
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.system.processes import SCRIPTS, Pair, environment, pair_of_processes

PROMPT = "def read_config(path):\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair_of_processes(tmp_path_factory.mktemp("run"), "demo") as pair:
        pair.start_store()
        pair.start_worker()
        yield pair


def generate(pair: Pair, *options: str) -> dict:
    return json.loads(pair.run("gpu-worker", "generate", "--json", *options).stdout)


def test_generate_json_has_the_documented_fields(pair: Pair) -> None:
    result = generate(pair, PROMPT, "--max-new-tokens", "12", "--ignore-eos")
    assert result.keys() == {"text", "token_ids", "finish_reason", "usage", "timings", "cache", "parts"}
    assert result["usage"].keys() == {"prompt_tokens", "completion_tokens", "cached_prompt_tokens"}
    assert result["timings"].keys() == {"queue_ms", "prefill_ms", "decode_ms", "tokens_per_second"}
    counted = {"hits", "misses", "hit_rate", "bytes_fetched", "staged", "misses_on_cpu"}
    assert result["cache"].keys() == counted | {"fetch_seconds", "compute_seconds"}
    assert result["finish_reason"] == "length"
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] == 12
    hits, misses = result["cache"]["hits"], result["cache"]["misses"]
    assert result["cache"]["hit_rate"] == pytest.approx(hits / (hits + misses))
    assert result["timings"]["tokens_per_second"] > 0


def test_the_time_of_a_request_is_accounted_for(pair: Pair) -> None:
    result = generate(pair, PROMPT, "--max-new-tokens", "12", "--ignore-eos")
    parts, timings, cache = result["parts"], result["timings"], result["cache"]
    assert parts.keys() == {f"{part}_seconds" for part in ("mamba", "attention", "moe", "mlp", "lm_head")}
    assert all(parts[f"{part}_seconds"] > 0 for part in ("mamba", "attention", "moe", "lm_head"))
    named = sum(parts.values()) + cache["compute_seconds"] + cache["fetch_seconds"]
    total = (timings["prefill_ms"] + timings["decode_ms"]) / 1e3
    assert 0.5 * total < named <= total
    stats = json.loads(pair.run("gpu-worker", "stats", "--json").stdout)
    assert all(stats["parts"][part] >= seconds for part, seconds in parts.items())


def test_text_and_its_token_ids_give_the_same(pair: Pair) -> None:
    score = json.loads(pair.run("gpu-worker", "score", "--json", "--text", str(_file(pair, PROMPT))).stdout)
    ids = ",".join(map(str, score["tokens"]))
    by_ids = generate(pair, "--token-ids", ids, "--max-new-tokens", "12")
    assert by_ids["text"] == generate(pair, PROMPT, "--max-new-tokens", "12")["text"]


def test_the_stream_is_the_text(pair: Pair) -> None:
    shown = pair.run("gpu-worker", "generate", PROMPT, "--max-new-tokens", "40")
    assert shown.stdout == generate(pair, PROMPT, "--max-new-tokens", "40")["text"] + "\n"
    assert "hit rate" in shown.stderr


def test_a_stop_string_ends_the_text_before_it(pair: Pair) -> None:
    whole = generate(pair, PROMPT, "--max-new-tokens", "40", "--ignore-eos")["text"]
    stop = whole[len(whole) // 2 :][:4]
    stopped = generate(pair, PROMPT, "--max-new-tokens", "40", "--ignore-eos", "--stop", stop)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(stop)]


def test_a_seed_reproduces_a_sample_and_another_does_not(pair: Pair) -> None:
    options = (PROMPT, "--temperature", "1.2", "--max-new-tokens", "24", "--ignore-eos")
    first, again, other = (generate(pair, *options, "--seed", seed)["token_ids"] for seed in "779")
    assert first == again != other


def test_what_does_nothing_without_a_temperature_is_told(pair: Pair) -> None:
    options = ("gpu-worker", "generate", PROMPT, "--max-new-tokens", "2", "--top-p", "0.9", "--seed", "7")
    assert "--top-p and --seed: without --temperature" in pair.run(*options).stderr
    assert "without --temperature" not in pair.run(*options, "--temperature", "0.5").stderr


def test_several_samples_are_told_one_after_the_other(pair: Pair) -> None:
    options = (PROMPT, "--samples", "2", "--temperature", "1.2", "--seed", "7", "--max-new-tokens", "12")
    both = generate(pair, *options)["samples"]
    assert [sample["usage"]["completion_tokens"] for sample in both] == [12, 12]
    assert both[0]["text"] != both[1]["text"]
    shown = pair.run("gpu-worker", "generate", *options).stdout
    assert shown == "".join(f"[{n}] 12 tokens, length\n{sample['text']}\n" for n, sample in enumerate(both))


def test_a_time_limit_is_told_in_words(pair: Pair) -> None:
    failed = pair.run(
        "gpu-worker",
        "generate",
        PROMPT,
        "--max-new-tokens",
        "2000",
        "--ignore-eos",
        "--timeout",
        "0.3",
        check=False,
    )
    assert failed.returncode == 1
    assert "did not answer in full within the time given" in failed.stderr.replace("\n", " ")


def test_chat_uses_the_checkpoints_template(pair: Pair) -> None:
    plain = generate(pair, "hello", "--max-new-tokens", "1")["usage"]["prompt_tokens"]
    assert generate(pair, "hello", "--chat", "--max-new-tokens", "1")["usage"]["prompt_tokens"] > plain


def test_standard_input(pair: Pair) -> None:
    done = subprocess.run(
        [str(SCRIPTS / "gpu-worker"), "generate", "-", "--json", "--max-new-tokens", "5"],
        input=PROMPT, capture_output=True, text=True, env=environment(pair.runtime), check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["text"] == generate(pair, PROMPT, "--max-new-tokens", "5")["text"]


@pytest.mark.parametrize(("output", "says"), [("/dev/full", "error: the output is not whole"), (None, "")])
def test_output_that_nobody_takes(pair: Pair, output: str | None, says: str) -> None:
    """A full disk is told of in one line, and a reader who has gone (None) not at all."""
    command = [str(SCRIPTS / "gpu-worker"), "stats"]
    reader, writer = os.pipe()
    os.close(reader)
    target = writer if output is None else os.open(output, os.O_WRONLY)
    done = subprocess.run(
        command, stdout=target, stderr=subprocess.PIPE, text=True, env=environment(pair.runtime), timeout=60
    )
    for descriptor in {writer, target}:
        os.close(descriptor)
    assert done.returncode == 1
    assert done.stderr.startswith(says) and done.stderr.count("\n") == bool(says)


@pytest.mark.parametrize("window", [(), ("--window", "64", "--stride", "16"), ("--window", "50")])
def test_score_adds_up(pair: Pair, window: tuple[str, ...]) -> None:
    path = _file(pair, PROMPT * 12)
    score = json.loads(pair.run("gpu-worker", "score", "--json", "--text", str(path), *window).stdout)
    logprobs = score["logprobs"]
    assert len(logprobs) == len(score["tokens"]) - 1 > 90
    assert score["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)))
    shown = pair.run("gpu-worker", "score", "--text", str(path), *window).stdout
    assert shown == f"{len(score['tokens'])} tokens, perplexity {score['perplexity']:.4f}\n"


def test_score_agrees_with_the_logprobs_of_generation(pair: Pair) -> None:
    """Entry i of score is token i + 1 given tokens 0..i: generation reports the same for what it chose."""
    generated = pair.generate([5, 6, 7, 8], 10)
    tokens = [5, 6, 7, 8, *generated.token_ids]
    command = ("gpu-worker", "score", "--json", "--token-ids", ",".join(map(str, tokens)))
    score = json.loads(pair.run(*command).stdout)
    assert score["tokens"] == tokens
    assert score["logprobs"][3:] == pytest.approx(generated.logprobs, abs=1e-4)


def test_windows_score_each_token_with_the_context_they_leave_it(pair: Pair) -> None:
    """Window 8, stride 4: tokens up to 7 see everything; after that, at least four before them."""
    tokens = list(range(100, 130))
    command = ("gpu-worker", "score", "--json", "--token-ids", ",".join(map(str, tokens)))
    windowed = json.loads(pair.run(*command, "--window", "8", "--stride", "4").stdout)["logprobs"]

    def logprob(start: int, position: int) -> float:
        ids = ",".join(map(str, tokens[start : position + 1]))
        return json.loads(pair.run(*command[:-1], ids).stdout)["logprobs"][-1]

    for position, start in ((7, 0), (8, 4), (11, 4), (12, 8), (29, 24)):
        assert windowed[position - 1] == pytest.approx(logprob(start, position), abs=1e-4)


def test_stats_tables_and_json(pair: Pair) -> None:
    assert "hit rate" in pair.run("gpu-worker", "stats").stdout
    assert "frames" in pair.run("expert-store", "stats").stdout
    worker = json.loads(pair.run("gpu-worker", "stats", "--json").stdout)
    store = json.loads(pair.run("expert-store", "stats", "--json").stdout)
    assert worker["requests_failed"] == 0
    assert (worker["slots_per_layer"], worker["policy"]) == (0, "direct")
    assert store["ready_frames"] == store["frames"] == 160
    assert store["leases"][0]["pid"] == pair.worker.popen.pid


@pytest.mark.parametrize("name", ["expert-store", "gpu-worker"])
def test_every_command_teaches(pair: Pair, name: str) -> None:
    """Help for each command: what it does, and an example where it does work."""
    overview = pair.run(name, "--help").stdout
    assert pair.run(name, "--version").stdout == f"expert-serving {version('expert-serving')}\n"
    commands = {"expert-store": "pack inspect verify", "gpu-worker": "generate score"}
    for command in ("start wait stats stop " + commands[name]).split():
        assert command in overview
        text = pair.run(name, command, "--help").stdout
        assert "Usage" in text
        if command in ("start", "pack", "inspect", "verify", "generate", "score"):
            assert "Example" in text, f"{name} {command}"


def test_stop_ends_both(pair: Pair) -> None:
    """Last in this module: it ends the pair."""
    pair.run("gpu-worker", "stop")
    assert pair.worker.popen.wait(20) == 0
    pair.run("expert-store", "stop")
    assert pair.store.popen.wait(20) == 0


def _file(pair: Pair, text: str) -> Path:
    path = pair.runtime / "text.log"
    path.write_text(text)
    return path
