"""Run EleutherAI's lm-evaluation-harness (the extra `eval`) on the ranks of a launch.

Rank 0 loads the tasks, writes the prompts and computes the metrics. The forward passes are shared: in each round every
rank takes one batch, as ZeRO-3 requires. A batch does not depend on the number of ranks, so neither do the metrics.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import yaml

from l2e_ds.checkpoint.state import rng_state, seed_everything, set_rng_state
from l2e_ds.console import did_you_mean, warn
from l2e_ds.data.tokenizer import name_end_of_text, take_special_tokens
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.errors import ConfigError, DataError, L2EError
from l2e_ds.system.files import error_line, one_line

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork this process, with its GPU and threads
logging.getLogger("lm_eval").setLevel(logging.ERROR)

from lm_eval.evaluator import evaluate as run_tasks  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OWN_TASKS = Path(__file__).parent / "tasks"  # the groups `paper` and `bigbench_lite`
SEED = 1234  # of the choice of examples in prompts; the harness's default
RESAMPLES = 1000  # bootstrap resamples, for standard errors without a formula (perplexity)


@dataclass(frozen=True)
class Tasks:
    """Tasks, loaded with their data sets by the harness's TaskManager. shots: each task's own number, by name."""

    loaded: dict[str, Any]
    shots: dict[str, int | None]


def load_tasks(names: Sequence[str], include_path: Sequence[str | Path], shots: Sequence[int | None] = ()) -> Tasks:
    """Return the tasks of these names.

    include_path: folders of task files (YAML), which replace known tasks of the same name. shots: the numbers of
    examples that will be asked for. Raises ConfigError and, for a data set that cannot be loaded, DataError.
    """
    for folder in include_path:
        _check_files(Path(folder))
    with _quiet():
        own = TaskManager(include_path=include_path, include_defaults=False)
        is_enough = set(names) <= set(own.all_subtasks)  # saves reading the harness's own 14,000 files
        manager = own if is_enough else TaskManager(include_path=[OWN_TASKS, *include_path])
        _check_known(names, manager.all_tasks)
        loaded = [_load(manager, name, is_own=name in own.all_tasks) for name in names]
        try:
            loaded_tasks = manager.load([built for part in loaded for built in part])
        except ValueError as error:  # a task is asked for twice
            raise ConfigError(one_line(error), where="tasks") from None
    own_shots = {name: task.get_config("num_fewshot") for name, task in loaded_tasks["tasks"].items()}
    tasks = Tasks(loaded_tasks, own_shots)
    _check_shots(tasks, shots)
    for task in loaded_tasks["tasks"].values():
        if hasattr(task, "sampler"):
            _leave_out_own_question(task)
    return tasks


def _check_files(folder: Path) -> None:
    """Raise ConfigError for a task file that cannot be read, which the harness would ignore, or a repeated name."""
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}", where="include_path")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            content = load_yaml(path, resolve_func=False, recursive=True)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(
                f"{path}{line}: {getattr(error, 'problem', None) or error}", where="include_path"
            ) from None
        except Exception as error:  # of a file that it includes
            raise ConfigError(one_line(error), where=("include_path", str(path))) from None
        name = content.get("task") if isinstance(content, dict) else None
        if isinstance(name, str) and files.setdefault(name, path) != path:
            raise ConfigError(f"{path}: the task {name!r} is also in {files[name]}", where="include_path")


def _check_shots(tasks: Tasks, asked: Sequence[int | None]) -> None:
    for name, task in tasks.loaded["tasks"].items():
        for number in asked:
            shots = _shots(tasks.shots[name], number)
            if not shots:
                continue
            documents = len(list(task.fewshot_docs()))
            if _split_of_examples(task) == (task.config.test_split or task.config.validation_split):
                documents -= 1  # a document is not an example for itself
            if shots > documents:
                raise ConfigError(f"got {shots}, the task {name} has {documents} examples", where="num_fewshot")


def _split_of_examples(task: Any) -> str | None:
    """Return the split from which the harness takes examples, or None if a task file lists them."""
    config = task.config
    if config.fewshot_config.split or config.fewshot_config.samples is not None:
        return config.fewshot_config.split
    return config.training_split or config.validation_split or config.test_split


def _leave_out_own_question(task: Any) -> None:
    """Make sure that no prompt of a task has its own question, answered, among its examples.

    The harness does so only if `fewshot_split` is the test split, and compares all fields, so that it misses a question
    that occurs twice. A task in which this never happens keeps the prompts that the harness writes.
    """
    sampler, write = task.sampler, task.fewshot_context
    draw, pool = sampler.sample, sampler.fewshot_docs()
    known: dict[int, set[tuple[str, str]]] = {}  # by the example's id(), as templates are slow

    def questions(example: Any) -> set[tuple[str, str]]:
        if id(example) not in known:
            known[id(example)] = _questions(task, example, task.fewshot_cfg)
        return known[id(example)]

    def sample(document: Any, n: int, eval_doc: Any = None) -> list[Any]:
        asked = _questions(task, document, task.config)

        def is_own(example: Any) -> bool:
            return example == document or not asked.isdisjoint(questions(example))

        try:
            examples = draw(n, eval_doc)
        except (AssertionError, ValueError):  # the harness asks for one more example than it returns
            examples = pool
        if len(examples) == n and not any(map(is_own, examples)):
            return examples
        others = [example for example in pool if not is_own(example)]
        if n > len(others):
            raise DataError(
                f"got {n}, the task {task.config.task} has {len(others)} examples that ask something else than one of"
                " its documents",
                where="num_fewshot",
            )
        sampler.replace_df(others)
        try:
            return draw(n)
        finally:
            sampler.replace_df(pool)

    def fewshot_context(document: Any, *arguments: Any, **settings: Any) -> Any:
        sampler.sample = functools.partial(sample, document)
        return write(document, *arguments, **settings)

    task.fewshot_context = fewshot_context


def _questions(task: Any, document: Any, form: Any) -> set[tuple[str, str]]:
    """Return what identifies a question: its text with its choices, and its text with its answer. form: the
    configuration of the task, or of its examples."""
    text = task.doc_to_text(document, form.doc_to_text)
    choices = task.doc_to_choice(document, form.doc_to_choice) if form.doc_to_choice else None
    answer = task.doc_to_target(document, form.doc_to_target)
    if choices and isinstance(answer, int):
        answer = choices[answer]
    if not isinstance(text, str):  # it is the number of a choice, and the choices are the texts
        text = ""
    if not text:
        return {("", repr(choices or answer))}
    return {(text, repr(choices)), (text, repr(answer))}


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, "`lm-eval ls tasks` prints all")
            raise ConfigError(f"no task or group {name!r}; {hint}", where="tasks")


def _load(manager: TaskManager, name: str, is_own: bool) -> list[Any]:
    """Return a task, a group, or the tasks of a tag. is_own: whether it is from a folder of include_path."""
    try:
        loaded = manager._load_spec(name)
    except Exception as error:  # `datasets`, the hub or a task's own code may raise anything
        cause = error.__cause__ or error
        hint = () if is_own else ("; without a hub, give local task files as ", "include_path")
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise DataError(f"task {name}: cannot be loaded: {reason}", *hint) from None
    return loaded if isinstance(loaded, list) else [loaded]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Tasks | None,
    num_fewshot: int | None,
    batch_size: int,
    limit: int | None = None,
    tick: Callable[[], None] = heartbeat.beat,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Return the metrics of tasks in the form of evaluations.jsonl (results.py), the same on every rank. Collective.

    model: a transformers model, or the DeepSpeed engine around it. tasks: from `load_tasks`, on rank 0. num_fewshot:
    examples in a prompt; None is each task's own number. tick: called before each round on every rank; it may raise, on
    all alike. report: called on rank 0 with the numbers of finished and of all requests of a kind. Random states and
    the model's mode are left unchanged. Raises L2EError for a task that fails.
    """
    begin, network = time.perf_counter(), getattr(model, "module", model)
    was_training, states = network.training, rng_state(network.device)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            seed_everything(SEED, 0)
            lm = SharedModel(network, tokenizer, batch_size, model, tick, report)
            if collectives.is_main():
                assert tasks is not None
                values = lm.lead(functools.partial(_run_tasks, lm, tasks, num_fewshot, limit))
            else:
                values = lm.follow()
    finally:
        set_rng_state(states, network.device)
        model.train(was_training)
    return {"seconds": time.perf_counter() - begin, "limit": limit, "ranks": collectives.size(), "tasks": values}


class SharedModel(HFLM):
    """The harness's Hugging Face model, with its batches dealt out to all ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        call: Callable[..., Any],
        tick: Callable[[], None],
        report: Callable[[int, int], None],
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        name_end_of_text(tokenizer)
        # In half precision the log-probabilities would be rounded to three digits.
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self.cut: dict[str, set[int]] = defaultdict(set)  # documents whose prompt is longer than the context, by task
        self._requests: Sequence[Any] = ()
        self._size, self._call, self._tick, self._report = batch_size, call, tick, report
        self._is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    # --- sharing batches -----------------------------------------------------------------------------------------

    def lead(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `action` on rank 0, which calls the methods below, and then release the other ranks from `follow`."""
        try:
            values = action()
        except L2EError as error:
            if not error.on_every_rank:  # only rank 0 knows of it; an error of a round is raised on all ranks
                error.on_every_rank = True
                collectives.broadcast_object(error)
            raise
        collectives.broadcast_object(values)
        return values

    def follow(self) -> dict[str, Any]:
        """Compute, on the other ranks, what rank 0 deals out until it has finished. Returns the values of `lead`."""
        while True:
            order = collectives.broadcast_object(None)
            if isinstance(order, L2EError):
                raise order
            if isinstance(order, dict):
                return order
            self._round(*order)

    def _deal(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Return the answers to sorted requests, in their order. Neighbours make a batch; a rank takes one a round."""
        ranks, size = collectives.size(), self._size
        batches = [requests[begin : begin + size] for begin in range(0, len(requests), size)]
        answers: list[Any] = []
        for begin in range(0, len(batches), ranks):
            order = (kind, begin, batches[begin : begin + ranks])
            collectives.broadcast_object(order)
            answers += [answer for batch_answers in self._round(*order) for answer in batch_answers]
            self._report(len(answers), len(requests))
        return answers

    def _round(self, kind: str, first: int, dealt: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Return the answers to the dealt batches; `first` is the first one's number. A rank without one computes the
        first one, too. Collective. Raises DataError on every rank if one of them fails."""
        self._tick()
        own = collectives.rank() if collectives.rank() < len(dealt) else 0
        torch.manual_seed(SEED + first + own)  # tasks that sample give the same on any number of ranks
        answer: Any
        try:
            answer = getattr(HFLM, kind)(self, dealt[own], disable_tqdm=True)
        except Exception as error:
            problem = f"rank {collectives.rank()}: {error_line(error)}"
            answer = DataError(problem, where="tasks")
        answers = collectives.all_gather_objects(answer)
        failed = next((answer for answer in answers if isinstance(answer, DataError)), None)
        if failed is not None:
            failed.on_every_rank = True
            raise failed
        return answers[: len(dealt)]

    # --- what the harness calls ----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._requests = requests
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._requests = ()

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether greedy decoding gives it) for each of the requests, which are
        ((text, text), context tokens, continuation tokens)."""

        def length_and_tokens(index: int) -> tuple[int, list[int]]:
            # Requests that differ only in their last token become neighbours, which share one row of a batch.
            _, context, continuation = requests[index]
            return -len(context) - len(continuation), context + continuation

        # `_requests` is empty for the windows of a text, which fit the context.
        for request, (_, context, continuation) in zip(self._requests, requests, strict=False):
            if len(context) + len(continuation) > self.max_length + 1:  # the last token is not an input
                self.cut[request.task_name].add(request.doc_id)
        order = sorted(range(len(requests)), key=length_and_tokens)
        without_texts = [(("", ""), *requests[index][1:]) for index in order]
        answers = self._deal("_loglikelihood_tokens", without_texts)
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self.batch_size_per_gpu = 10**9  # requests all windows at once, of which `_deal` makes batches
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = self._size

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        def settings(index: int) -> str:
            return repr(requests[index].args[1])

        def settings_and_length(index: int) -> tuple[str, int, str]:
            return settings(index), -lengths[index], requests[index].args[0]

        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for request, length in zip(requests, lengths, strict=True):
            if length + normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] > self.max_length:
                self.cut[request.task_name].add(request.doc_id)
        order = sorted(range(len(requests)), key=settings_and_length)
        answers: list[str] = []
        for wanted in dict.fromkeys(map(settings, order)):  # all requests of a batch have the same settings
            same = [requests[index] for index in order if settings(index) == wanted]
            # A rank needs only (text, settings) of a request.
            answers += self._deal("generate_until", [SimpleNamespace(args=request.args) for request in same])
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return logits [B, T, V] for tokens [B, T]."""
        return self._call(input_ids=inps, use_cache=False).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        if self._is_sharded:
            settings["synced_gpus"] = True  # a rank that is done runs on with the others, which need its shards
        config = copy.copy(self.model.generation_config)
        take_special_tokens(config, self.tokenizer)  # which may be another one than the model's own
        settings["eos_token_id"] = config.eos_token_id
        return super()._model_generate(context, max_length, stop, **settings)


def _run_tasks(lm: SharedModel, tasks: Tasks, num_fewshot: int | None, limit: int | None) -> dict[str, dict[str, Any]]:
    """Run the tasks on rank 0 and return their results by name. Raises DataError."""
    for name, task in tasks.loaded["tasks"].items():
        task.set_config(key="num_fewshot", value=_shots(tasks.shots[name], num_fewshot))
        task.set_fewshot_seed(seed=SEED)
    with _quiet():
        try:
            evaluated = run_tasks(lm, tasks.loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
        except L2EError:
            raise
        except Exception as error:  # a task's own code may raise anything
            names = ", ".join(tasks.shots)
            raise DataError(f"{names}: {error_line(error)}", where="tasks") from error
    values = _results_by_task(evaluated, {name: len(documents) for name, documents in lm.cut.items()})
    for name, task in values.items():
        if task["cut"] and task["part_of"] is None:
            warn(
                f"{name}, {task['num_fewshot']}-shot: {task['cut']:,} of {task['samples']:,} prompts"
                f" do not fit the context of {lm.max_length:,} tokens and were cut from the left"
            )
    return values


def _shots(own: int | None, asked: int | None) -> int:
    """Return how many examples a task uses. As in the harness, a task whose own number is 0 keeps it."""
    return own or 0 if asked is None or own == 0 else asked


def _results_by_task(evaluated: dict[str, Any], cut: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return the harness's results in the form of evaluations.jsonl. cut: how many prompts were cut, by task."""
    children = evaluated.get("group_subtasks", {})
    samples = evaluated["n-samples"]

    def tasks_of(name: str) -> list[str]:
        return [name] if name in samples else [task for child in children[name] for task in tasks_of(child)]

    metrics_by_name = {name: _metrics_of(evaluated, name, tasks_of(name)) for name in evaluated["results"]}
    parents = {child: group for group, names in children.items() for child in names if metrics_by_name.get(group)}
    return {
        name: {
            "samples": sum(samples[task]["effective"] for task in tasks_of(name)),
            # The harness has no number for nested groups. A task that keeps 0 does not count.
            "num_fewshot": max(evaluated["n-shot"][task] for task in tasks_of(name)),
            "cut": sum(cut.get(task, 0) for task in tasks_of(name)),
            "version": evaluated["versions"].get(name),
            "part_of": parents.get(name),
            "metrics": metrics,
        }
        for name, metrics in metrics_by_name.items()
        if metrics
    }


def _metrics_of(evaluated: dict[str, Any], name: str, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the metrics of a task or group. tasks: those of the group, or the task itself."""
    metrics = {}
    for key, value in evaluated["results"][name].items():
        metric, separator, answer_filter = key.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        lower_is_better = any(evaluated["higher_is_better"].get(task, {}).get(metric) is False for task in tasks)
        metrics[metric if answer_filter == "none" else key] = {
            "value": _finite(value),
            "stderr": _finite(evaluated["results"][name].get(f"{metric}_stderr,{answer_filter}")),
            "higher_is_better": not lower_is_better,
        }
    return metrics


def _finite(value: Any) -> float | None:
    """Return a finite number, or None for anything else, which JSON could not hold."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the harness's progress bars and what it prints. Errors of other threads still reach stderr."""
    original = tqdm.__init__

    def without_bar(bar: tqdm, *arguments: Any, **settings: Any) -> None:
        original(bar, *arguments, **{**settings, "disable": True})

    tqdm.__init__ = without_bar
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original
