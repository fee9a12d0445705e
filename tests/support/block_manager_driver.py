"""Random operations for `block_manager_machine.Machine`: what a busy server does to it."""

from block_manager_machine import Machine
from block_manager_setup import Sequence, prompt_of


class Driver:
    """Draws operations for a Machine from a seed."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.rng = machine, machine.rng
        self.past_prompts: list[list[int]] = []

    def run(self, num_ops: int) -> None:
        machine, rng = self.machine, self.rng
        while machine.num_ops < num_ops:
            self._between_steps()
            self._step()
            while len(machine.in_flight) > (0 if rng.random() < 0.1 else machine.setup.depth):
                machine.settle()
        # Left alone, everything still running or waiting must come to its end.
        for _ in range(200 * (len(machine.running) + len(machine.waiting) + 1)):
            if not machine.running and not machine.waiting:
                break
            self._step()
            while len(machine.in_flight) > machine.setup.depth:
                machine.settle()
        assert not machine.running and not machine.waiting, "no progress"
        while machine.in_flight:
            machine.settle()
        machine.check_empty()

    def _between_steps(self) -> None:
        machine, rng = self.machine, self.rng
        live = machine.running + machine.waiting
        if len(live) < 7 and rng.random() < 0.35:
            self._add()
        if live and rng.random() < 0.05:
            machine.abort(rng.choice(self._mid_prefill() or live))
        if machine.running and rng.random() < 0.04:
            machine.preempt(rng.choice(self._mid_prefill() or machine.running))
        if rng.random() < 0.01:
            machine.reset_prefix_cache()

    def _mid_prefill(self) -> list[Sequence]:
        """Running requests in their prompt, or nobody, so that others have their turn."""
        is_wanted = self.rng.random() < 0.6
        return [s for s in self.machine.running if is_wanted and s.num_slots < s.prompt_len]

    def _add(self) -> None:
        rng, setup, bs = self.rng, self.machine.setup, self.machine.bs
        longest = setup.max_model_len - 1
        family = rng.randrange(3)
        if self.past_prompts and rng.random() < 0.25:
            prompt, family = list(rng.choice(self.past_prompts)), None
        else:
            length = rng.choice(
                (
                    rng.randint(1, longest),
                    rng.randint(longest // 2, longest),
                    rng.randint(1, longest // bs) * bs + rng.choice((0, setup.suffix)),
                    rng.randint(1, longest // bs) * bs + rng.choice((-1, 1)),
                    rng.randint(1, setup.budget or setup.window),
                    setup.suffix + rng.randint(1, setup.budget or longest),
                )
            )
            prompt = prompt_of(family, min(length, longest))
            if rng.random() < 0.25:
                family = None
                num_shared = rng.randrange(len(prompt))
                prompt[num_shared:] = [self.machine.unique_token() for _ in prompt[num_shared:]]
        self.past_prompts.append(prompt)
        self.machine.add(prompt, max_tokens=rng.randint(1, 2 * bs), family=family)

    def _step(self) -> None:
        """One schedule() call: running requests first, then waiting ones in order."""
        machine = self.machine
        has_preempted = False
        for sequence in list(machine.running):
            if has_preempted and sequence not in machine.running:
                break
            num_new = self._next_chunk(sequence)
            while num_new and not machine.advance(sequence, num_new):
                victim = machine.running[-1]
                machine.preempt(victim)
                has_preempted = True
                if victim is sequence:
                    break
        for sequence in [] if has_preempted else list(machine.waiting):
            request = sequence.request
            if request.num_stale_output_tokens and not request.drop_stale_output:
                continue
            if len(machine.running) == 5 or self.rng.random() < 0.1:
                break
            if not machine.admit(sequence, lambda hit, s=sequence: self._chunk(s, hit)):
                break
        if machine.step:
            machine.launch()
        elif machine.in_flight:
            machine.settle()

    def _next_chunk(self, sequence: Sequence) -> int:
        """Tokens of a running request's next chunk; 0 leaves it out of the step."""
        request, max_model_len = sequence.request, self.machine.setup.max_model_len
        pending, computed = request.num_output_placeholders, request.num_computed_tokens
        assert request.num_tokens + pending == len(sequence.tokens)
        if pending and computed + 2 - pending >= sequence.prompt_len + request.max_tokens:
            return 0
        # The step's token budget may be spent before this request's turn.
        if len(sequence.tokens) == computed or self.rng.random() < 0.1:
            return 0
        return min(self._chunk(sequence, computed), max_model_len - computed - 1)

    def _chunk(self, sequence: Sequence, start: int) -> int:
        rng, bs, compact_len = self.rng, self.machine.bs, self.machine.compact_len(sequence)
        remaining = len(sequence.tokens) - start
        boundary = compact_len // bs * bs
        end = rng.choice(
            (
                start + remaining,
                start + remaining,
                start + rng.randint(1, 3),
                start + rng.randint(1, remaining),
                (start // bs + rng.randint(1, 4)) * bs,
                compact_len - rng.randint(1, self.machine.setup.window),
                rng.randint(boundary, compact_len),
            )
        )
        return max(1, min(end - start, remaining))
