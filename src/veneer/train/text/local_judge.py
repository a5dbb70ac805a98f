"""A judge in this process: the base, or another adapter on the trained base.

    ask = sampled_judge(base, attachment, sampler, {"base", "acme/critic@2"})       a `rewards.judge.AskModel`
    rewards_of(sections, ask=ask)

The run's sampler answers. There is one base in memory and one engine, so a judge costs its tokens and its
adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from veneer.adapters.use import load_adapter
from veneer.errors import AdapterError, bullets
from veneer.models.text.generate import rendered
from veneer.train.config.section import BASE_MODEL
from veneer.train.rewards.judge import AskModel, Question, Reply
from veneer.train.text.rollouts import CompletionRequest, Sampler, SamplingParams

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase


def sampled_judge(base: TextBase, attachment: Attachment, sampler: Sampler, models: Collection[str]) -> AskModel:
    """Attach the judges' adapters; return the function that asks them.

    `models`: adapters by name or folder, and `BASE_MODEL`. Raises AdapterError for an invalid adapter or one
    that the sampler does not support, MismatchError for an adapter of another base."""
    names = {BASE_MODEL: ""}
    for model in sorted(set(models) - {BASE_MODEL}):
        own = names[model] = f"{model}, as a judge"
        attachment.add(own, load_adapter(base, model))
        if problems := sampler.problems(own):
            raise AdapterError(
                f"nothing can be drawn from {model}:\n{bullets(problems)}", where="reinforcement.rewards"
            )

    def asked(question: Question) -> CompletionRequest | Reply:
        text = rendered(base, question.messages)
        ids = tuple(base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) + question.tokens > base.context:
            return Reply(error=f"the question has {len(ids)} tokens, and {question.tokens} are left for its answer")
        how = SamplingParams(question.tokens, question.temperature, question.top_p, question.grammar)
        return CompletionRequest(ids, question.seed, how, names[question.model])

    def ask(questions: Sequence[Question], /) -> list[Reply]:
        made = [asked(question) for question in questions]
        drawn = iter(sampler.draw([each for each in made if isinstance(each, CompletionRequest)]) or ())
        replies = []
        for each in made:
            if isinstance(each, CompletionRequest):
                said = next(drawn)
                usage = {"prompt_tokens": len(each.prompt), "completion_tokens": len(said.tokens)}
                usage["total_tokens"] = sum(usage.values())
                error = "" if said.cut or said.text.strip() else "the judge said nothing"
                each = Reply(said.text, usage, error, cut=said.cut)
            replies.append(each)
        return replies

    return ask
