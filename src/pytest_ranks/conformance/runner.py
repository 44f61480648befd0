"""Runs checks: each in the controller, where the oracle is, and the subject's training on ranks.

Equal jobs run once and answer many checks, also across xdist's workers: a run is a folder named
after its job, behind a lock. Each run gets freshly forked ranks.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.conformance.check import Check, Setting
from pytest_ranks.conformance.findings import (
    AdapterError,
    CheckResult,
    Finding,
    Inconclusive,
    NotApplicable,
    NotRun,
)
from pytest_ranks.conformance.job import Job, Optimizer
from pytest_ranks.conformance.materials import Materials, locked
from pytest_ranks.conformance.oracle import one_thread
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.subject import find_subject, inspect_subject
from pytest_ranks.errors import RankFailure, RankTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from pytest_ranks.conformance.subject import Capabilities
    from pytest_ranks.launch.host import RankHost
    from pytest_ranks.models.corpora import Corpus
    from pytest_ranks.observe.draws import Draw
    from pytest_ranks.observe.records import Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished training run.

    Attributes:
        job: what was asked.
        folder: where everything of it lies.
        parameters: full tensors after training.
        history: what the subject reported, a dict a step.
        observed: what the spies saw, by rank; empty where the subject starts its own ranks.
        draws: readings of samples, for a job with `augmented`.
    """

    job: Job
    folder: Path
    parameters: dict[str, Tensor]
    history: list[dict[str, Any]]
    observed: tuple[Observed, ...]
    draws: tuple[Draw, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A run without a result.

    Attributes:
        text: what happened.
        cause: the likely cause.
        refused: the subject returned something that is no result.
    """

    text: str
    cause: str = ""
    refused: bool = False


class Session:
    """What all checks of one subject share: its ranks, its materials, the runs that are done.

    Args:
        subject: a class, or a text such as "mylib.testing:MyTrainer".
        folder: where models and runs are written.
        device: "cpu", or "cuda" for ranks with a GPU each.

    Raises:
        BadInputError: when the subject cannot be used.
    """

    def __init__(self, subject: object, folder: Path, *, device: str = "cpu") -> None:
        self.ref = find_subject(subject)
        self.folder = folder
        self.device = device
        self._host: RankHost | None = None
        self.host()  # starts importing in the background, while this process imports the subject
        self.capabilities: Capabilities = inspect_subject(self.ref)
        self.materials = Materials(folder)
        self._runs: dict[str, list[Run] | Broken] = {}
        self.gates: dict[Setting, Exception | None] = {}

    def host(self) -> RankHost:
        """Return the ranks, started at the first call."""
        if self._host is None:
            from pytest_ranks.conformance.preload import modules_for
            from pytest_ranks.launch.host import RankHost

            self._host = RankHost(preload=modules_for(self.ref))
        return self._host

    def close(self) -> None:
        """End the ranks."""
        if self._host is not None:
            self._host.close()
            self._host = None

    def train(self, jobs: Sequence[Job]) -> list[Run]:
        """Train jobs one after the other in the same fresh ranks; a sequence that ran before is not run again.

        Raises:
            Finding: when the subject raised, died or did not finish.
            AdapterError: when it returned something else than a `Trained`.
        """
        name = "-".join([job.key() for job in jobs])
        slug = re.sub(r"\W+", "-", f"{self.ref.module.rpartition('.')[2]}-{self.ref.name}").strip(
            "-"
        )
        folder = self.folder / "runs" / slug / name
        if name not in self._runs:
            with locked(folder.parent / f"{name}.lock"):
                record = folder / "run.pickle"
                if not record.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    half = record.with_suffix(".half")
                    half.write_bytes(pickle.dumps(self._launch(jobs, folder)))
                    half.rename(record)
                self._runs[name] = self._read(jobs, folder, pickle.loads(record.read_bytes()))
        runs = self._runs[name]
        if isinstance(runs, Broken):
            if runs.refused:
                raise AdapterError(runs.text)
            raise Finding(
                "train(job) MUST return", runs.text, tolerance="", cause=runs.cause, run=str(folder)
            )
        return runs

    def _launch(self, jobs: Sequence[Job], folder: Path) -> list[list[Observed]] | Broken:
        """Return what each rank saw of each job, or why there is nothing to see."""
        placed = [
            dataclasses.replace(job, out_dir=str(folder / f"out{index}"))
            for index, job in enumerate(jobs)
        ]
        for index, job in enumerate(placed):
            Path(job.out_dir).mkdir(exist_ok=True)
            (folder / f"job{index}.json").write_text(json.dumps(dataclasses.asdict(job), indent=1))
        alone = jobs[0].strategy == "single" or self.capabilities.launch == "self"
        try:
            results: list[list[Observed] | str] = self.host().run(
                "pytest_ranks.conformance.rank_side:train_on_rank",
                world_size=1 if alone else jobs[0].world_size,
                args=(
                    self.ref,
                    placed,
                    [str(folder / f"result{index}") for index in range(len(jobs))],
                ),
                timeout=sum(job.timeout for job in jobs),
                backend="nccl" if self.device == "cuda" else "gloo",
                init=not alone and self.capabilities.process_group == "ours",
                rank_variables=not alone,
            )
        except RankTimeout as error:
            return Broken(text=str(error), cause="ranks wait for each other, or the run is endless")
        except RankFailure as error:
            return Broken(text=str(error), cause="train(job) raised, or a rank died")
        refused = next((result for result in results if isinstance(result, str)), None)
        if refused is not None:
            return Broken(text=refused, refused=True)
        return [result for result in results if not isinstance(result, str)]

    def _read(
        self, jobs: Sequence[Job], folder: Path, seen: list[list[Observed]] | Broken
    ) -> list[Run] | Broken:
        if isinstance(seen, Broken):
            return seen
        from safetensors.torch import load_file

        from pytest_ranks.conformance.rank_side import DRAWS, HISTORY, PARAMETERS
        from pytest_ranks.observe.draws import read_draws

        runs = []
        for index, job in enumerate(jobs):
            result = folder / f"result{index}"
            trained = load_file(result / PARAMETERS)
            starts_itself = self.capabilities.launch == "self"  # its ranks are where no spy is
            observed = () if starts_itself else tuple(rank[index] for rank in seen)
            if starts_itself or any(rank.training_forwards() for rank in observed):
                # Else the job's model was never called: the gate says so, which says more.
                self.materials.compare_shapes(job.model, trained)
            runs.append(
                Run(
                    job=job,
                    folder=folder,
                    parameters=trained,
                    history=json.loads((result / HISTORY).read_text()),
                    observed=observed,
                    draws=tuple(read_draws(result / DRAWS)),
                )
            )
        return runs


class Bench:
    """What a check works with: jobs in one setting, and their runs.

    Attributes:
        session: the subject's session.
        setting: strategy and world size.
        capabilities: what the subject declares.
        materials: the models before training.
    """

    def __init__(self, session: Session, setting: Setting) -> None:
        self.session = session
        self.setting = setting
        self.capabilities = session.capabilities
        self.materials = session.materials

    def job(self, model: str, corpus: Corpus, **fields: Any) -> Job:
        """Return a job in this setting; fields are those of `Job`."""
        dropout = fields.get("dropout", 0.0)
        fields.setdefault("pad_token_id", 1)
        fields.setdefault("optimizer", Optimizer())
        return Job(
            model=model,
            model_dir=self.materials.model_dir(model, dropout=dropout),
            tokenizer_dir=self.materials.tokenizer_dir(fields["pad_token_id"]),
            samples=corpus.samples,
            device=self.session.device,
            strategy=self.setting.strategy,  # type: ignore[arg-type]
            world_size=self.setting.world_size,
            **fields,
        )

    def train(self, job: Job) -> Run:
        """Return the job's run.

        Raises:
            Finding: when the subject raised, died or did not finish.
        """
        return self.session.train([job])[0]

    def train_in_turn(self, jobs: Sequence[Job]) -> list[Run]:
        """Return the runs of jobs that were trained one after the other in the same processes."""
        return self.session.train(jobs)

    def alone(self) -> Bench | None:
        """Return the same bench for a single process, if the subject can run so."""
        single = Setting(strategy="single", world_size=1)
        if "single" not in self.capabilities.strategies or 1 not in self.capabilities.world_sizes:
            return None
        return Bench(self.session, single)

    def layouts(self, global_batch: int) -> list[tuple[int, int]]:
        """Return the (micro_batch, gradient_accumulation_steps) that make up a global batch here."""
        share, rest = divmod(global_batch, self.setting.world_size)
        if rest or not share:
            return []
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        pairs = [(size, share // size) for size in sizes]
        return pairs if self.capabilities.gradient_accumulation else pairs[:1]


def run_check(
    session: Session, check: Check, setting: Setting | None, *, expected: str | None = None
) -> CheckResult:
    """Run one check in one setting and return its result; a subject's failure never raises here.

    Args:
        session: the subject's session.
        check: the check.
        setting: strategy and world size; None when it is not applicable in any.
        expected: the reason why it is expected to fail, or None.
    """
    began = time.perf_counter()
    outcome, text, finding = _judge(session, check, setting)
    name = check.id if setting is None else f"{check.id}[{setting}]"
    if finding is not None:
        text = finding.text(name)
        if expected is not None:
            outcome, text = "expected failure", f"{expected}: {finding.found}"
    elif expected is not None and outcome == "passed":
        outcome = "unexpected pass"
        text = f"{name} passed, but it is in expected_failures ({expected}): remove it there"
    return CheckResult(
        check=check.id,
        setting="" if setting is None else str(setting),
        outcome=outcome,
        text=text,
        seconds=time.perf_counter() - began,
        finding=finding,
    )


def _judge(
    session: Session, check: Check, setting: Setting | None
) -> tuple[str, str, Finding | None]:
    unmet = check.unmet(session.capabilities)
    if unmet or setting is None:
        return "not applicable", unmet, None
    bench = Bench(session, setting)
    try:
        if check.suite != "subject" and session.capabilities.launch == "ranks":
            _gate(bench)
        with one_thread():
            check.run(bench)
    except Finding as finding:
        return "failed", "", finding
    except AdapterError as error:
        return "adapter error", str(error), None
    except NotApplicable as error:
        return "not applicable", str(error), None
    except NotRun as error:
        return "not run", str(error), None
    except Inconclusive as error:
        return "inconclusive", str(error), None
    return "passed", "", None


def _gate(bench: Bench) -> None:
    """Run `subject.honours_job` once a setting; what it raises ends every other check there.

    Raises:
        AdapterError: the subject does something else than the job says.
        NotRun: the strategy was not seen to take effect.
    """
    gates = bench.session.gates
    if bench.setting not in gates:
        from pytest_ranks.conformance.checks.subject import check_honours_job

        gates[bench.setting] = None
        try:
            check_honours_job(bench)
        except (AdapterError, NotRun, Inconclusive) as error:
            gates[bench.setting] = error
        except Finding as finding:
            gates[bench.setting] = AdapterError(f"{finding.rule}: {finding.found.splitlines()[0]}")
    verdict = gates[bench.setting]
    if isinstance(verdict, AdapterError):
        raise AdapterError(f"not run, since subject.honours_job[{bench.setting}] failed: {verdict}")
    if verdict is not None:
        raise verdict


def check_trainer(
    subject: object,
    *,
    suites: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    device: str = "cpu",
    progress: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run the suites on a trainer, without pytest.

    Args:
        subject: a class, or a text such as "mylib.testing:MyTrainer".
        suites: names of suites or check ids; None means all.
        expected_failures: check id to reason, such as a link to the bug report.
        folder: where runs are kept; None means a temporary one that is removed.
        device: "cpu", or "cuda" for ranks with a GPU each.
        progress: called with each result as it comes.

    Returns:
        One result a check and setting.

    Raises:
        BadInputError: when the subject, a suite or an expected failure is none.
    """
    with tempfile.TemporaryDirectory(prefix="pytest-ranks-") as temporary:
        session = Session(
            subject, Path(folder) if folder is not None else Path(temporary), device=device
        )
        try:
            results = []
            expected = {**session.ref.declared_failures(), **(expected_failures or {})}
            for check, setting, reason in plan_for(session.capabilities, suites, expected):
                result = run_check(session, check, setting, expected=reason)
                results.append(result)
                if progress is not None:
                    progress(result)
            return results
        finally:
            session.close()
