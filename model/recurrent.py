"""Recurrent depth: a few layers applied again and again to a state, as in "Scaling up Test-Time Compute with Latent
Reasoning" (arXiv 2502.05171).  B batch, L positions, D hidden, N tokens still at work, V vocabulary, R steps.

At each step the state is joined with the embedded input by an adapter and goes through the core's layers. In training
the number of steps is sampled, and only the last few are differentiated. At test time a token may stop once another
step would hardly change its prediction; later tokens then see the keys and values of its last step wherever they look
for those of a further one. So a token's result depends on tokens before it alone, with a cache or without.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from model.attention import LayerInputs, MegaTransformerBlock, SelectedTokens, SimpleBlock
from model.cpu_kernels import Linear
from model.kv_cache import take_back
from model.norms import build_norm
from model.thinking import ResolvedThinking


class SumAdapter(nn.Module):
    """state + input."""

    def __init__(self, config):
        super().__init__()

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """(..., D), (..., D) -> (..., D)."""
        return state + x


class GateAdapter(nn.Module):
    """g state + (1 - g) input, with g = sigmoid([state, input] W + b)."""

    def __init__(self, config):
        super().__init__()
        self.gate = Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """(..., D), (..., D) -> (..., D)."""
        return torch.lerp(x, state.to(x.dtype), torch.sigmoid(self.gate(torch.cat([state, x], dim=-1))).to(x.dtype))


class LinearAdapter(nn.Module):
    """[state, input] W."""

    def __init__(self, config):
        super().__init__()
        self.proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """(..., D), (..., D) -> (..., D)."""
        return self.proj(torch.cat([state, x], dim=-1)).to(x.dtype)


ADAPTERS = {"sum": SumAdapter, "gate": GateAdapter, "linear": LinearAdapter}


class MegaTransformerRecurrentBlock(nn.Module):
    """The recurrent core.

    A cache holds, for each step, a slot per layer of the core and one per layer of the coda, in this order.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        sandwich = config.recurrent_use_sandwich_norm
        self.layers = nn.ModuleList(MegaTransformerBlock(config, sandwich) for _ in range(config.n_recurrent_layers))
        self.adapter = ADAPTERS[config.recurrent_adapter_method](config)
        self.state_norm = build_norm(config) if config.recurrent_use_state_norm else nn.Identity()
        if config.recurrent_state_initialization == "learned":
            self.learned_state = nn.Parameter(torch.zeros(config.hidden_size))

    def initial_state(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The state before the first step, (B, L, D).

        Args:
            x: embedded input, (B, L, D).
            noise: standard normal, (B, L, D), for `recurrent_state_initialization="normal"` in training; None: new.
        """
        kind = self.config.recurrent_state_initialization
        if kind == "normal" and self.training:
            noise = torch.randn_like(x) if noise is None else noise.to(x.dtype)
            return noise * self.config.recurrent_state_std
        if kind == "learned":
            return self.learned_state.to(x.dtype).expand_as(x)
        # Otherwise zeros, which are also the mean of "normal", for evaluation.
        return x if kind == "embedding" else torch.zeros_like(x)

    def slot(self, step: int, first_slot: int) -> int:
        """The cache's slot of the core's first layer at a step."""
        # Steps own their slots, or share them with every `recurrent_cache_steps`-th step.
        shared_by = self.config.recurrent_cache_steps or self.config.recurrent_max_thinking_steps
        return self.number(step % shared_by, first_slot)

    def number(self, step: int, first_slot: int) -> int:
        """The slot of the core's first layer at a step where no steps share slots; dropout goes by it."""
        return first_slot + step * (len(self.layers) + self.config.n_coda_layers)

    def make_room(self, shared: LayerInputs, step: int, first_slot: int, *, length: int, first_step: int = 0) -> None:
        """Where steps share slots, take back what an earlier step of this call wrote for the same tokens."""
        shared_by = self.config.recurrent_cache_steps
        if shared.cache is not None and shared_by is not None and step - first_step >= shared_by:
            for n in range(len(self.layers)):
                take_back(shared.cache, self.slot(step, first_slot) + n, length)

    def check_past(self, cache: Cache | None, first_slot: int, thinking: ResolvedThinking) -> None:
        """Check that a cache holds the keys and values of every step that this call reads.

        Raises: ValueError: the past lacks those of a step.
        """
        config, n_steps = self.config, thinking.n_steps
        if cache is None or cache.is_compileable or (past := cache.get_seq_length()) == 0:
            return
        # Slots of the core, one per step up to the number of those that are not shared.
        n_own = min(n_steps, config.recurrent_cache_steps or n_steps)
        slots = [self.slot(step, first_slot) for step in range(n_own)]
        # Slots of the coda: of every step that compares predictions, else of the last step alone.
        if config.n_coda_layers:
            by_prediction = thinking.exit_threshold and config.recurrent_exit_criterion == "kl"
            first = min(config.recurrent_exit_min_steps, n_steps) - 2 if by_prediction else n_steps - 1
            slots += [self.slot(step, first_slot) + len(self.layers) for step in range(max(first, 0), n_steps)]
        for slot in slots:
            if (length := cache.get_seq_length(slot)) != past:
                raise ValueError(
                    f"the cache holds {past} tokens, but only {length} of them in slot {slot}, which {n_steps} "
                    f"thinking steps {'with' if thinking.exit_threshold else 'without'} exits read: continue with the "
                    "number of steps, and with or without exits, that the past was computed with"
                )

    def forward(self, x: Tensor, shared: LayerInputs, first_slot: int, *, thinking: ResolvedThinking) -> Tensor:
        """The state after all steps, without exits.

        Args:
            x: embedded input, (B, L, D).
            first_slot: the cache's slot of the first layer at the first step.
            thinking: resolved; steps before the last `n_backprop_steps` keep nothing for the backward pass.
        Returns: (B, L, D).
        """
        n_steps, n_backprop_steps, carried = thinking.n_steps, thinking.n_backprop_steps, thinking.carried
        # The first state; every parameter gets a gradient, also where no step with a gradient reads the first state.
        state = self.initial_state(x, thinking.initial_state)
        if carried is not None and carried.state is not None:
            state = carried.state
        has_gradient = torch.is_grad_enabled()
        if has_gradient and n_steps > n_backprop_steps and hasattr(self, "learned_state"):
            x = x + 0.0 * self.learned_state  # A gradient of zero: engines want one of every parameter.
        # Steps; only the last `n_backprop_steps` have a graph.
        first_step = n_steps - thinking.n_taken
        for step in range(first_step, n_steps):
            slot, number = self.slot(step, first_slot), self.number(step, first_slot)
            self.make_room(shared, step, first_slot, length=x.shape[1], first_step=first_step)
            with torch.set_grad_enabled(has_gradient and step >= n_steps - n_backprop_steps):
                hidden = self.adapter(state, x)
                for n, layer in enumerate(self.layers):
                    if shared.states is not None:
                        shared.states.append(hidden)
                    inputs = shared.keyed(number + n)
                    hidden = layer(hidden, inputs, slot + n if shared.cache is not None else 0)
                state = self.state_norm(hidden)
        if carried is not None:
            carried.state = state
        return state

    @torch.no_grad()
    def forward_until_exit(
        self,
        x: Tensor,
        shared: LayerInputs,
        first_slot: int,
        *,
        thinking: ResolvedThinking,
        coda: SimpleBlock,
        predict: Callable[[Tensor], Tensor],
        is_token: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let each token think until its prediction (criterion `kl`) or state (`latent_difference`) settles.

        kl                    KL(softmax of the step before || softmax of this step) < threshold, in nats; the coda and
                              the head are run at each step from the one before `recurrent_exit_min_steps` on, on the
                              tokens that are still at work
        latent_difference     |state - state before| / |state| < threshold

        Args:
            x: embedded input, (B, L, D).
            thinking: resolved; at most `n_steps`, with `exit_threshold` > 0.
            predict: what the coda gives, (N, D), to log-probabilities, (N, V) fp32.
            is_token: (B, L) bool, false at padding, which takes no step; None: all are tokens.
        Returns: with `kl` the coda's output, else the state, (B, L, D); and steps taken, (B, L) int64.
        """
        max_steps, by_prediction = thinking.n_steps, self.config.recurrent_exit_criterion == "kl"
        layers = [*self.layers, *(coda.layers if by_prediction else [])]
        tokens = SelectedTokens(
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if is_token is None else is_token
        )
        # Tokens at work as rows (N, D): their states, and the embedded input that is fed again at every step.
        state, fed = tokens.select(self.initial_state(x)), tokens.select(x)
        result, steps = torch.zeros_like(x), torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        before = None
        for step in range(max_steps):
            # One step of the core on the tokens at work.
            slot = self.slot(step, first_slot)
            self.make_room(shared, step, first_slot, length=x.shape[1])
            hidden = self.adapter(state, fed)
            for n, layer in enumerate(self.layers):
                hidden = layer.forward_selected(hidden, tokens, shared, layer=n, slot=slot + n)
            former, state = state, self.state_norm(hidden)
            out, is_last, before_exits = state, step + 1 == max_steps, step + 2 < self.config.recurrent_exit_min_steps
            if before_exits and not is_last:
                continue
            # What the tokens at work give if this is their last step.
            if by_prediction:
                for n in range(len(self.layers), len(layers)):
                    out = layers[n].forward_selected(out, tokens, shared, layer=n, slot=slot + n)
            result = tokens.scatter(out.to(result.dtype), result)
            steps = tokens.scatter(torch.full_like(tokens.batch, step + 1), steps)
            if is_last:
                break
            # How much this step changed: the prediction, in nats, or the state, relative to its norm; (N,).
            if by_prediction:
                now = predict(out)
                change = None if before is None else (before.exp() * (before - now)).sum(-1)
                before = now
            else:
                change = (state - former).float().norm(dim=-1) / state.float().norm(dim=-1)
            if change is None or step + 1 < self.config.recurrent_exit_min_steps:
                continue
            # Tokens whose change is below the threshold leave.
            stays = change >= thinking.exit_threshold
            if not stays.all():
                tokens.narrow(stays)
                if not len(tokens):
                    break
                state, fed = state[stays], fed[stays]
                before = None if before is None else before[stays]
        self.fill_forward(tokens, shared, first_slot, n_taken=step + 1, max_steps=max_steps)
        return result, steps

    def fill_forward(
        self, tokens: SelectedTokens, shared: LayerInputs, first_slot: int, *, n_taken: int, max_steps: int
    ) -> None:
        """Give the slots of steps that no token has taken the keys and values of the tokens' last steps."""
        if shared.cache is None:
            return
        for step in range(n_taken, min(max_steps, self.config.recurrent_cache_steps or max_steps)):
            for n, (keys, values) in tokens.last.items():
                shared.cache.update(keys, values, self.slot(step, first_slot) + n)
