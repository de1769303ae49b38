"""Training by transformers' Trainer: the student has fake-quantized weights and inputs, the teacher is it without.

Only what the roundings learn is trained and kept in checkpoints; everything else of the Trainer (accelerate, schedules,
clipping, resuming with the state of optimizer and generators, data parallelism: every process has a part of a step's
batch, and under FSDP of all parameters) is as it comes. Without dropout: the student is the model that will be
evaluated, and the teacher the same without rounding.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hf_quant.capture import answer, arguments_of
from hf_quant.errors import CalibrationError, RunError
from hf_quant.learning.checkpoints import WholeCheckpoints
from hf_quant.learning.evaluated import as_evaluated, recompute_as_evaluated
from hf_quant.learning.kept import Offset, offsets, settled
from hf_quant.learning.rows import ENTRY, collate, counted, rows_of, size_of, targets_of
from hf_quant.learning.scaled import scale_of
from hf_quant.learning.shards import as_shared, gathered, mine, whole
from hf_quant.learning.student import Student
from hf_quant.learning.tuning import floating
from hf_quant.learning.undone import own_accelerator, own_generators, own_modules, quiet
from hf_quant.learning.zero import altered, hand_over
from hf_quant.qtensor import QTensor
from hf_quant.running.distributed import by_deepspeed, processes
from hf_quant.running.progress import inner
from hf_quant.runtime.branches import Branch
from hf_quant.runtime.conv import convolutions
from hf_quant.stages.fakequant import FakeQuant
from hf_quant.stages.input_quant import InputQuant
from hf_quant.stages.sampler import Batch
from hf_quant.stages.trainer import Qat, Trained
from hf_quant.stages.tuner import Fitted

FILE = "rounding.safetensors"
HISTORY = "history"  # [steps, 2]: loss and tokens of every step, beside what is learned


def train(
    how: Qat,
    model: nn.Module,
    start: Mapping[str, Fitted],
    batches: Sequence[Batch],
    seed: int,
    folder: Path | None,
    others: Mapping[str, nn.Module],
) -> Trained:
    """See `stages.trainer.Trainer.train`."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    students: dict[str, Student] = {}
    weights: dict[str, QTensor] = {}
    branches: dict[str, Branch] = {}
    ranges: dict[str, tuple[Tensor, Tensor | None]] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch.enable_grad(),
        own_generators(),
        own_accelerator(),
        own_modules(model) as tree,
    ):
        modules = {name: tree.get_submodule(name) for name in start}
        if how.gradient_checkpointing:
            recompute_as_evaluated(tree)
        vectors = offsets(tree) if how.lr_norms else {}
        whole = convolutions(tree)
        rows = rows_of(batches)
        for name, fitted in start.items():
            module = modules[name]
            transposed = not isinstance(module, nn.Linear)
            weight: Tensor = module.weight  # type: ignore[assignment]
            with torch.no_grad():
                fake = how.rounding.start(weight.T if transposed else weight, fitted.q, generator)
            inputs = None if fitted.inputs is None else InputQuant(fitted, 1.0, how.input_lr, generator)
            students[name] = Student(fake, inputs, transposed).to(weight.device)
            if inputs is not None:
                inputs.place(module, whole).register_forward_pre_hook(students[name].round_input)
            parametrize.register_parametrization(module, "weight", students[name], unsafe=True)
        place = folder or Path(scratch)
        trainer = _Trainer(how, tree, students, vectors, others, rows, seed, place, keep=folder is not None)
        history = trainer.run()
        probe = collate(rows[:1])
        with torch.no_grad():
            said = (probe, answer(trainer.run_model(tree.eval(), trainer._prepare_inputs(dict(probe)))))
            if bool(said[1].isnan().any()):
                raise RunError("training diverged in its last step: give a smaller learning rate (lr=...)")
            for name, student in students.items():
                with gathered(modules[name]):
                    weights[name] = student.export(modules[name])
                    if (branch := student.fake.branch()) is not None:
                        branches[name] = branch
                    if student.inputs and (found := student.inputs.fitted()) is not None:
                        ranges[name] = found
        kept = settled(tree, vectors)
        state = [mine(t) for s in trainer.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        if by_deepspeed():
            trainer.model_wrapped.destroy()  # it would keep all of it for as long as the process runs
    measured = {
        "steps": float(how.steps),
        "tokens": sum(tokens for _, tokens in history),
        "first_loss": history[0][0],
        "last_loss": sum(loss for loss, _ in history[-10:]) / len(history[-10:]),
        "seconds": time.perf_counter() - started,
        "trained": float(sum(getattr(p, "ds_numel", p.numel()) for of in trainer.stepped for p in of)),
        "optimizer_bytes": float(sum(t.numel() * t.element_size() for t in state)),
    }
    return Trained(weights, measured, branches, ranges, said, kept)


class _Trainer(WholeCheckpoints):
    """transformers' Trainer with our loss, our parameter groups, and checkpoints of what is learned alone."""

    def __init__(
        self,
        how: Qat,
        model: nn.Module,
        students: Mapping[str, Student],
        vectors: Mapping[str, Offset],
        others: Mapping[str, nn.Module],
        rows: list[dict[str, Tensor]],
        seed: int,
        folder: Path,
        *,
        keep: bool,
    ) -> None:
        self.how, self.students, self.vectors, self.others = how, students, vectors, others
        self.scale, self.history = scale_of(model), list[tuple[float, float]]()
        self.bar = iter(inner(range(how.steps), description="steps", total=how.steps))
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=how.steps,
            per_device_train_batch_size=how.batch_size // processes(),
            lr_scheduler_type="constant_with_warmup" if how.schedule == "constant" else how.schedule,
            warmup_steps=how.steps // 10,
            max_grad_norm=how.clip * self.scale,
            save_strategy="steps" if keep else "no",
            save_steps=max(1, how.steps // 10),
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu" and not by_deepspeed(),
            remove_unused_columns=False,
            ddp_broadcast_buffers=False,  # frozen weights are among them, and alike everywhere
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one: DataParallel would copy what is learned
        super().__init__(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[_Steps(self)])
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.can_return_loss = True
        if (plugin := getattr(self.accelerator.state, "fsdp_plugin", None)) is not None:
            plugin.mixed_precision_policy = None  # it would round step sizes; `run_model` casts products alone
        hand_over(self, arguments.max_grad_norm)

    def run(self) -> list[tuple[float, float]]:
        """Train, from the last checkpoint if there is one; loss and tokens of every step."""
        from transformers.trainer_utils import get_last_checkpoint

        folder = Path(self.args.output_dir)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        with quiet():
            self.train(resume_from_checkpoint=last)
        for _ in self.bar:
            pass  # a bar that stays open would stay on the screen
        return self.history

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ANN401
        """AdamW, a group a learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for student in self.students.values():
            for parameter, rate in student.learned():
                groups.setdefault(rate, []).append(parameter)
        if self.vectors:
            groups.setdefault(self.how.lr_norms, []).extend(v.offset for v in dict.fromkeys(self.vectors.values()))
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate} for rate, p in groups.items()],
            betas=(0.9, 0.95),
            eps=1e-8 * self.scale,
            weight_decay=0.0,
        )
        self.stepped = list(groups.values())
        return self.optimizer

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The loss of `Qat`, and the penalties of the roundings."""
        how, distill = self.how, self.how.distill
        as_evaluated(model)
        if distill < 1 and "labels" not in inputs:  # of a causal language model, see `rows.check_labels`
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            inputs = {**inputs, "labels": ids if mask is None else ids.masked_fill(mask == 0, -100)}
        out = self.run_model(model, inputs)
        mine = answer(out)
        of, parts = counted(self.model, inputs, mine), []
        if distill > 0:
            with torch.no_grad(), self._teacher():
                target = how.loss.remember(answer(self.run_model(model, inputs))[of])
            parts.append((distill * how.loss.loss(mine[of], target, None), float(target.shape[:-1].numel())))
        if distill < 1:
            if (own := getattr(out, "loss", None)) is None:
                raise CalibrationError(
                    f"distill={distill} trains on the model's own loss, and {type(self.model).__name__} computes none "
                    f"of {', '.join(inputs)}: give it the labels it wants, or distill=1"
                )
            targets = targets_of(self.model, inputs["labels"])
            own = own if targets else 0 * mine.flatten()[0]  # the mean over no label is no number
            parts.append(((1 - distill) * own, float(targets)))
        loss = self._shared(parts, float(size_of(inputs)))
        progress = self.state.global_step / max(1, self.how.steps)
        for student in self.students.values():
            penalty = student.fake.anneal(progress)
            if penalty is not None:
                loss = loss + penalty
        loss = loss * self.scale
        return (loss, out) if return_outputs else loss

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        """One forward; tables are read at the timesteps of these rows."""
        for student in self.students.values():
            if student.inputs is not None:
                student.inputs.entry_B = inputs.get(ENTRY)
        with self.accelerator.autocast():
            return model(**arguments_of(self.model, inputs))

    def _shared(self, parts: Sequence[tuple[Tensor, float]], tokens: float) -> Tensor:
        """Note loss and tokens of a step; returns the process's share of the sum of `parts`.

        Each is a mean, and over how many (positions, labels): it is taken over those of all processes.
        """
        means, several = torch.stack([mean for mean, _ in parts]), processes()
        counts = means.new_tensor([count for _, count in parts])
        sums = torch.cat([means.detach() * counts, counts, means.new_tensor([tokens])])
        sums = self.accelerator.reduce(sums, "sum") if several > 1 else sums
        totals, everywhere = sums[: len(parts)], sums[len(parts) : -1].clamp(min=1)
        mean = float((totals / everywhere).sum())
        if not math.isfinite(mean):
            raise RunError(
                f"training diverged: the loss is {mean} at step {len(self.history) + 1} of {self.how.steps}; give a "
                "smaller learning rate (lr=...), or a number of type bfloat16 or float32 to what is float16"
            )
        self.history.append((mean, float(sums[-1])))
        next(self.bar, None)
        share: Tensor = (means * (counts * several / everywhere)).sum()
        return share

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        switches: list[Student | Offset] = [*self.students.values(), *self.vectors.values()]
        for switch in switches:
            switch.on = False
        try:
            with floating(self.model, self.others):
                yield
        finally:
            for switch in switches:
                switch.on = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is learned, and the history; every process gives its part."""
        folder, learned = Path(output_dir or self.args.output_dir), self._learned()
        kept = {name: whole(tensor).contiguous() for name, tensor in learned.items()}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({**kept, HISTORY: torch.tensor(self.history, dtype=torch.float64)}, folder / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401
        try:
            kept = load_file(Path(resume_from_checkpoint) / FILE)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{resume_from_checkpoint} is damaged ({error}); delete it and run again") from None
        self.history = [(loss, tokens) for loss, tokens in kept[HISTORY].tolist()]
        for _ in self.history:
            next(self.bar, None)
        with torch.no_grad():
            for name, tensor in self._learned().items():
                tensor.copy_(as_shared(kept[name], tensor))

    def _learned(self) -> dict[str, Tensor]:
        rounded: dict[str, Tensor] = {
            f"{site}.{i}": parameter
            for site, student in self.students.items()
            for i, (parameter, _) in enumerate(student.learned())
        }
        return rounded | {path: vector.offset for path, vector in self.vectors.items()}


class _Steps(TrainerCallback):  # type: ignore[misc]  # an untyped base
    """Tells the roundings of every step."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Gradients are there."""
        for student in self.trainer.students.values():
            student.fake.before_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Parameters have moved."""
        for student in self.trainer.students.values():
            if type(student.fake).after_step is not FakeQuant.after_step:
                with altered(list(student.fake.parameters())):
                    student.fake.after_step()
