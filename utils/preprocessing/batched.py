"""Preprocessing with a model: workers read and fit the raw files, the main process encodes them in batches.

The model lives in the main process only, on the GPU where there is one. Samples are batched in the order of the
source, so the tensors do not depend on the number of workers.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from utils.preprocessing.arguments import BatchedPreprocessArguments
from utils.preprocessing.driver import Preprocess
from utils.preprocessing.samples import Example, Outcome, Prepared, Task
from utils.preprocessing.workers import CHUNK, map_in_workers

MAX_BYTES = 256 << 20  # Arrays that wait for a batch to be full; long clips come in smaller batches.


class BatchedPreprocess(Preprocess):
    """Preprocessing of one stage by a model: `encode` gives what the model needs, `encode_batch` what is written."""

    arguments_class = BatchedPreprocessArguments
    models: ClassVar[tuple[str, ...]] = ()  # Attributes that stay in the main process.
    chunk: ClassVar[int] = CHUNK  # Tasks that a worker gets at once, whose arrays are in memory together.

    def block_of(self, number: int) -> int:
        # Padding and kernels, which choose by the size of a batch how they round, are those of one process.
        return number // self.args.batch_size

    def encode_batch(self, examples: list[Example]) -> list[dict[str, Tensor]]:
        """The tensors to write for each example; at most `--batch_size` examples, whose `data` `encode` returned."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The state that workers get: without the models, which stay in the main process."""
        return {name: value for name, value in vars(self).items() if name not in self.models}

    def work(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        """As `Preprocess.work`; outcomes with nothing to write come at once, the others batch by batch."""
        # Tasks whose examples do not fill a batch yet, in the order of the source.
        waiting: list[Prepared] = []
        size = 0
        prepared_tasks = map_in_workers(self.prepare_arrays, tasks, self.args.num_workers, chunk=self.chunk)
        for prepared in prepared_tasks:
            if not prepared.examples:
                yield prepared.outcome
                continue
            # Samples of two blocks never meet in a batch, so that batches do not depend on the shards.
            if waiting and self.block_of(waiting[0].outcome.number) != self.block_of(prepared.outcome.number):
                yield from self.encode_and_write(waiting)
                waiting, size = [], 0
            waiting.append(prepared)
            size += n_bytes(prepared)
            if sum(len(prepared.examples) for prepared in waiting) >= self.args.batch_size or size >= MAX_BYTES:
                yield from self.encode_and_write(waiting)
                waiting, size = [], 0
        yield from self.encode_and_write(waiting)

    def prepare_arrays(self, task: Task) -> Prepared:
        """`prepare` with arrays, since every tensor would hold a file open on its way to the main process."""
        prepared = self.prepare(task)
        examples = [
            dataclasses.replace(example, data={name: tensor.numpy() for name, tensor in example.data.items()})
            for example in prepared.examples
        ]
        return dataclasses.replace(prepared, examples=examples)

    def encode_and_write(self, waiting: list[Prepared]) -> Iterator[Outcome]:
        """Encode the examples of some tasks in batches, then write them task by task."""
        # What the workers sent as arrays, as tensors again.
        examples = [
            dataclasses.replace(example, data={name: torch.from_numpy(array) for name, array in example.data.items()})
            for prepared in waiting
            for example in prepared.examples
        ]
        # The model's outputs; a batch may hold examples of several tasks, and a task may span two batches.
        encoded: list[Example] = []
        for start in range(0, len(examples), self.args.batch_size):
            batch = examples[start : start + self.args.batch_size]
            outputs = zip(batch, self.encode_batch(batch), strict=True)
            encoded += [dataclasses.replace(example, data=tensors) for example, tensors in outputs]
        # Back to the tasks they came from, in the same order.
        remaining = iter(encoded)
        for prepared in waiting:
            yield self.write(prepared.outcome, list(itertools.islice(remaining, len(prepared.examples))))


def n_bytes(prepared: Prepared) -> int:
    """Size of the arrays of a task."""
    return sum(array.nbytes for example in prepared.examples for array in example.data.values())
