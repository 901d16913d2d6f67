"""Generation of text, images and audio in one stream, with the keys and values of what came before.

B streams, R rows (B, with guidance 2 B), S keys, V vocabulary, D hidden, m tokens of a span, W values of a token.

Text is sampled token by token until one begins a span. The span's flow is solved: at each step its noisy tokens go
through the trunk, see the prefix in the cache and each other, and are taken back from the cache. Where something
follows, the clean latents are appended. Guidance is a second row per stream, which holds <bos> <null> and the
beginning of the present span alone, like the streams that are trained without their text. A mask hides the keys of
padding, so that a row does not depend on those beside it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from model.diffusion_process import DiffusionProcess
from model.multimodal.layout import Part, Stream, build_stream, check_span, join_streams, length_token, span_positions
from model.multimodal.mask import stream_mask
from model.multimodal.spans import Spans, spans_in
from model.multimodal.stream_state import Answer, Rows, Sampling, StreamState, at, draw
from model.samplers import guided_denoiser, initial_noise, sample
from model.thinking import CarriedState, Thinking
from utils.flags.choices import SPANS, Modality

N_NULL = 2  # Tokens of a guidance row before the span: <bos> <null>.


class MultimodalGenerationMixin(GenerationMixin):
    """`generate()` of a multimodal model."""

    config: Any
    model: Any
    encoder: Any
    decoders: Any
    processes: dict[str, DiffusionProcess]
    lm_head: Any
    training: bool
    device: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        prompts: Sequence[Sequence[Part]],
        sampling: Sampling | None = None,
        *,
        generators: Sequence[torch.Generator],
        lengths: Sequence[int] | None = None,
        on_part: Callable[[int, Part], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        on_estimate: Callable[[Modality, int, list[Part]], None] | None = None,
    ) -> list[list[Part]]:
        """Answers to prompts.

        Args:
            prompts: parts of each stream, spans with latents.
            sampling: options.
            generators: one per stream, of all its random numbers.
            lengths: number of tokens of each stream's audio, instead of the model's own.
            on_part: called with the number of the stream and each part of its answer once it is complete.
            on_token: called with the number of the stream and each token of its text at once.
            on_estimate: called with the modality of the spans at work, the number of the denoiser's evaluation, from
                1, and the spans as they are estimated. What any of these functions raises ends the generation.
        Returns: the parts of each answer; spans have `latents` (m, W).
        Raises: ValueError: the model is in train mode, an option that does not fit it, not one generator per stream, a
            prompt that leaves no room for its answer.
        """
        sampling = sampling or Sampling()
        self.check_generation(prompts, sampling, generators)
        if not prompts:
            return []
        answers = [Answer(sampling.begin) for _ in prompts]
        state = self.begin_streams(prompts, sampling)

        def complete(row: int, part: Part) -> None:
            answers[row].parts.append(part)
            if on_part is not None:
                on_part(row, part)

        while any(answer.is_open for answer in answers):
            # The next token of each open row; one that begins a span waits for it.
            tokens: list[int | None] = [None] * len(state.streams)
            waits: dict[Modality, list[int]] = {name: [] for name in SPANS}
            for row, answer in enumerate(answers):
                if not answer.is_open:
                    continue
                token = self.next_token(state.logits[row], answer, sampling, generators[row])
                modality = self.modality_of(token)
                if modality is not None:
                    waits[modality].append(row)
                elif token != self.config.eos_token_id:
                    answer.text.append(token)
                    answer.n_text += 1
                    if on_token is not None:
                        on_token(row, token)
                    tokens[row] = token
                ends = modality is None and tokens[row] is None
                answer.is_open = not ends and (modality is not None or answer.n_text < sampling.max_new_tokens)
                # A text is complete where a span begins and where the answer ends.
                if answer.text and (modality is not None or not answer.is_open):
                    complete(row, Part("text", ids=answer.text))
                    answer.text = []
            if any(token is not None for token in tokens):
                self.feed_tokens(state, tokens)
            # Spans, and what follows them.
            for modality, rows in waits.items():
                if not rows:
                    continue
                seen = None if on_estimate is None else functools.partial(on_estimate, modality)
                spans = self.generate_spans(state, modality, Rows(rows), sampling, generators, lengths, seen)
                for row, span in zip(rows, spans):
                    complete(row, span)
                    answers[row].n_spans += 1
                    answers[row].is_open = "text" in sampling.modalities
                goes_on = {row: span for row, span in zip(rows, spans) if answers[row].is_open}
                if goes_on:
                    self.append_spans(state, modality, goes_on)
        return [answer.parts for answer in answers]

    def check_generation(
        self, prompts: Sequence[Sequence[Part]], sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> None:
        """Raises: ValueError: see `generate`."""
        if self.training:
            raise ValueError("generate() in train mode would draw dropout and thinking steps; call model.eval() first")
        if len(generators) != len(prompts):
            raise ValueError(f"generators has {len(generators)} entries for {len(prompts)} prompts; give one each")
        sampling.check(self.config)

    def next_token(self, logits: Tensor, answer: Answer, sampling: Sampling, generator: torch.Generator) -> int:
        """The token that a row's answer goes on with: text, the end, or one that begins a span."""
        config, begin = self.config, answer.begin
        answer.begin = None
        if begin in SPANS:
            return getattr(config, f"{begin}_begin_token_id")
        # Text tokens are those below <null>; padding and <bos> are not text.
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[: config.null_token_id] = True
        allowed[[token for token in (config.pad_token_id, config.bos_token_id) if token is not None]] = False
        allowed[config.eos_token_id] = True
        if answer.n_spans < sampling.max_spans:
            for name in set(SPANS) & set(sampling.modalities) & set(config.modalities):
                allowed[getattr(config, f"{name}_begin_token_id")] = True
        return draw(logits.masked_fill(~allowed, -torch.inf), sampling.temperature, generator)

    def modality_of(self, token: int) -> Modality | None:
        """The modality of the span that a token begins."""
        begins = {name: getattr(self.config, f"{name}_begin_token_id") for name in self.decoders}
        return next((name for name, begin in begins.items() if begin == token), None)  # type: ignore[return-value]

    # ---- Feeding the trunk.

    def begin_streams(self, prompts: Sequence[Sequence[Part]], sampling: Sampling) -> StreamState:
        """Feed the prompts, and the rows of guidance where a modality of the answer has it."""
        config = self.config
        streams = [build_stream(config, parts, is_open=True) for parts in prompts]
        n_new, limit = sampling.max_new_tokens * ("text" in sampling.modalities), config.max_position_embeddings
        for row, stream in enumerate(streams):
            if len(stream) + n_new > limit:
                raise ValueError(
                    f"prompt {row} has {len(stream)} tokens, which with max_new_tokens={n_new} are more than "
                    f"max_position_embeddings={limit}; give a shorter one"
                )
        names = {*sampling.modalities, sampling.begin} & set(self.decoders)
        if any(sampling.guidance(config, name) != 1 for name in names):
            null = [Part("text", ids=[config.null_token_id])]
            streams += [build_stream(config, null, is_open=True) for _ in prompts]
        batch = join_streams(streams, config.pad_token_id or 0)
        ids, positions = batch.ids.to(self.device), batch.positions.to(self.device)
        placement = type(batch.placement)(*(vector.to(self.device) for vector in batch.placement))
        x, _ = self.encoder(self.model.embed_tokens(ids), prompt_spans(streams, prompts, self.device))
        state = StreamState(streams, torch.zeros(len(streams), 0, dtype=torch.bool, device=self.device), sampling)
        hidden = self.trunk(state, x, positions, stream_mask(placement))
        state.is_token = placement.document >= 0
        last = torch.tensor([len(stream) - 1 for stream in streams], device=self.device)
        state.logits = self.lm_head(hidden[torch.arange(len(last), device=self.device), last]).float()
        return state

    def trunk(self, state: StreamState, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Normed hidden states (R, n, D) of new tokens (R, n, D), whose keys are appended to the cache.

        Args: positions: (R, n). mask: (R, 1, n, S + n).
        """
        core: dict[str, Any] = {}
        if self.model.core is not None:
            core = {"n_steps": state.sampling.n_thinking_steps, "exit_threshold": 0.0, "carried": state.carried}
        output = self.model(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=state.cache,
            use_cache=True,
            thinking=Thinking(**core),
            return_dict=True,
        )
        return output.last_hidden_state

    def feed_tokens(self, state: StreamState, tokens: Sequence[int | None]) -> None:
        """Append one token of text, or a special one, to the rows that have one, and predict what follows it."""
        config, device = self.config, self.device
        is_new = torch.tensor([[token is not None] for token in tokens], device=device)
        ids = torch.tensor([[config.pad_token_id or 0 if token is None else token] for token in tokens], device=device)
        positions = torch.tensor([[stream.cursor] for stream in state.streams], device=device)
        x = self.model.embed_tokens(ids)
        hidden = self.trunk(state, x, positions, state.mask(is_new))
        state.is_token = torch.cat([state.is_token, is_new], dim=1)
        state.logits = torch.where(is_new, self.lm_head(hidden[:, -1]).float(), state.logits)
        for stream, token in zip(state.streams, tokens):
            if token is None:
                continue
            # Text goes on, or a new one begins.
            start, n = stream.text
            if token < config.null_token_id:
                stream.text = (start, n + 1) if n and start + n == stream.cursor else (stream.cursor, 1)
            stream.cursor += 1

    # ---- Spans.

    def generate_spans(
        self,
        state: StreamState,
        modality: Modality,
        rows: Rows,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        lengths: Sequence[int] | None = None,
        on_estimate: Callable[[int, list[Part]], None] | None = None,
    ) -> list[Part]:
        """Begin a span in some rows and solve its flow; the cache ends with what begins the span."""
        config, n_streams = self.config, len(generators)
        scale = sampling.guidance(config, modality)
        null = Rows(row + n_streams for row in rows) if scale != 1 else Rows()
        for row in null:
            # What began the span before is forgotten.
            state.is_token[row, N_NULL:] = False
            state.streams[row].cursor, state.streams[row].text = N_NULL, (1, 1)
        self.feed_tokens(state, at(rows + null, len(state.streams), getattr(config, f"{modality}_begin_token_id")))
        sizes = [config.image_n_tokens] * len(rows)
        if modality == "audio":
            sizes = self.audio_lengths(state, rows, sampling, generators, lengths)
            opening: list[int | None] = [None] * len(state.streams)
            for row, size in zip(rows + null, sizes * 2):
                opening[row] = length_token(config, size)
            self.feed_tokens(state, opening)

        # Tokens of rows without a span are padding.
        n_tokens, n_rows = max(sizes), len(state.streams)
        row_sizes = dict(zip(rows + null, sizes * 2))
        counts = torch.tensor([row_sizes.get(row, 0) for row in range(n_rows)], device=self.device)
        positions = torch.zeros(n_rows, n_tokens)
        for row, size in row_sizes.items():
            stream = state.streams[row]
            places, _ = span_positions(config, modality, size, cursor=stream.cursor, text=stream.text)
            positions[row, :size] = torch.tensor(places)
        positions = positions.to(self.device)

        def network(x: Tensor, time: Tensor, chosen: Rows) -> Tensor:
            latents = x.new_zeros(n_rows, *x.shape[1:]).index_copy(0, torch.tensor(chosen, device=x.device), x)
            times = x.new_ones(n_rows).index_copy(0, torch.tensor(chosen, device=x.device), time / 1000)
            prediction = self.span_prediction(state, modality, latents, times, counts=counts, positions=positions)
            return prediction[chosen]

        # From noise, which is each row's own, to latents.
        process, width = self.processes[modality], config.token_width(modality)
        noise = [initial_noise((size, width), [generators[row]], process)[0] for row, size in zip(rows, sizes)]
        x = pad_sequence(noise, batch_first=True).to(self.device)
        denoiser = guided_denoiser(process, network, rows, null_condition=null, scale=scale)
        sampler = sampling.sampler.get(modality, getattr(config, f"{modality}_sampler"))
        n_steps = sampling.n_steps.get(modality, getattr(config, f"{modality}_n_sampling_steps"))
        state.carried = None if sampling.n_carried_steps is None else CarriedState(sampling.n_carried_steps)
        times, own = process.sampling_times(n_steps), [generators[row] for row in rows]

        def spans(latents: Tensor) -> list[Part]:
            return [Part(modality, latents=latents[n, :size]) for n, size in enumerate(sizes)]

        def show(number: int, estimate: Tensor) -> None:
            if on_estimate is not None:
                on_estimate(number, spans(estimate))

        latents = sample(
            sampler, denoiser, x, process=process, times=times, generators=own, lengths=sizes, on_estimate=show
        )
        state.carried = None
        return spans(latents)

    def audio_lengths(
        self,
        state: StreamState,
        rows: Rows,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        lengths: Sequence[int] | None,
    ) -> list[int]:
        """Tokens of each row's audio, given or predicted."""
        first, limit = self.config.audio_length_token_id, self.config.audio_max_tokens
        sizes = []
        for row in rows:
            logits = state.logits[row, first : first + limit]
            predicted = 1 + draw(logits, sampling.length_temperature, generators[row]) if lengths is None else 0
            sizes.append(predicted if lengths is None else lengths[row])
            check_span(self.config, Part("audio", n_tokens=sizes[-1]))
        return sizes

    def span_prediction(
        self,
        state: StreamState,
        modality: Modality,
        latents: Tensor,
        times: Tensor,
        *,
        counts: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """The flow's prediction (R, m, W) at noisy latents (R, m, W) and times (R,); the cache stays as it is.

        Args: counts: tokens of each row's span, (R,). positions: (R, m).
        """
        zero = torch.zeros_like(counts)
        encoded = self.encoder.encode(modality, Spans(latents, times, zero == 0, counts, zero, zero))
        is_new = torch.arange(latents.shape[1], device=counts.device) < counts[:, None]
        x = encoded.tokens.to(self.model.embed_tokens.weight.dtype)
        hidden = self.trunk(state, x, positions, state.mask(is_new))
        state.forget_new()
        return self.decoders[modality](hidden, encoded.times, encoded.shared)

    def append_spans(self, state: StreamState, modality: Modality, spans: dict[int, Part]) -> None:
        """Append clean latents to the rows that go on, and the token that ends a span."""
        config, n_rows = self.config, len(state.streams)
        n_tokens = max(part.n_tokens for part in spans.values())
        counts = torch.tensor(
            [spans[row].n_tokens if row in spans else 0 for row in range(n_rows)], device=self.device
        )
        latents = torch.zeros(n_rows, n_tokens, config.token_width(modality), device=self.device)
        positions = torch.zeros(n_rows, n_tokens)
        for row, part in spans.items():
            stream, size = state.streams[row], part.n_tokens
            places, advance = span_positions(config, modality, size, cursor=stream.cursor, text=stream.text)
            latents[row, :size] = part.latents.to(self.device)  # type: ignore[union-attr]
            positions[row, :size] = torch.tensor(places)
            stream.cursor += advance
        zero = torch.zeros_like(counts)
        clean = Spans(latents, torch.zeros(n_rows, device=self.device), zero > 0, counts, zero, zero)
        is_new = torch.arange(n_tokens, device=self.device) < counts[:, None]
        x = self.encoder.encode(modality, clean).tokens.to(self.model.embed_tokens.weight.dtype)
        self.trunk(state, x, positions.to(self.device), state.mask(is_new))
        state.is_token = torch.cat([state.is_token, is_new], dim=1)
        self.feed_tokens(state, at(Rows(spans), n_rows, getattr(config, f"{modality}_end_token_id")))


def prompt_spans(
    streams: Sequence[Stream], prompts: Sequence[Sequence[Part]], device: torch.device
) -> dict[str, Spans]:
    """The spans of prompts as the encoder takes them."""
    spans: dict[str, Spans] = {}
    for name in SPANS:
        numbers, places = spans_in(streams, name)
        if not places:
            continue
        latents = [prompts[row][place.part].latents for row, place in places]
        if any(tokens is None for tokens in latents):
            raise ValueError(f"a part of modality {name!r} in a prompt has no latents")
        lengths, rows, starts = numbers.to(device)
        padded = pad_sequence([tokens.float() for tokens in latents if tokens is not None], batch_first=True).to(
            device
        )
        times = torch.zeros(len(places), device=device)
        spans[name] = Spans(padded, times, times > 0, lengths, rows, starts)
    return spans
