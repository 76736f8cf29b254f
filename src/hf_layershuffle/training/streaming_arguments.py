# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `hf-layershuffle train` for data that is read as a stream."""

from dataclasses import dataclass, field


@dataclass
class StreamingArguments:
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images as a stream: Parquet or tar files (WebDataset), of a folder or of the "
            "Hub, without a copy. Only the evaluation split is stored."
        },
    )
    num_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "With --streaming: images of an epoch. Defaults to those that the stream says it holds; one that "
            "does not say, such as tar files, needs this or --max_steps."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={
            "help": "With --streaming: images, not decoded, among which the next one is drawn; the files are shuffled "
            "too. 0 shuffles nothing."
        },
    )

    def check_streaming(self, max_train_samples: int | None) -> None:
        """Raises a `ValueError` for values that would do nothing or cannot be."""
        fields = type(self).__dataclass_fields__
        if not self.streaming and self.shuffle_buffer_size != fields["shuffle_buffer_size"].default:
            raise ValueError(
                f"`shuffle_buffer_size` is {self.shuffle_buffer_size} without a stream; add --streaming, or leave it "
                "out: images that are not streamed are shuffled wholly."
            )
        if not self.streaming and self.num_train_samples is not None:
            raise ValueError(
                f"`num_train_samples` is {self.num_train_samples} without a stream; add --streaming, or use "
                "--max_train_samples."
            )
        if self.streaming and max_train_samples is not None:
            raise ValueError(
                f"`max_train_samples` is {max_train_samples}, and of a stream no rows can be drawn; use "
                "--num_train_samples, which is the images of an epoch."
            )


STREAMING_ARGUMENTS = tuple(StreamingArguments.__dataclass_fields__)
