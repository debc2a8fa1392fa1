"""What a calibration draws."""

from __future__ import annotations


def calibration_prompts(
    model: str, prompts: list[str] | None, prompt_file: str | None, *, samples: int, seed: int
) -> list[str]:
    """The prompts that the user gave; the playground's models have their own.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    from diffalign.pipelines.load import PLAYGROUND
    from diffalign.sample import read_prompts

    if prompts is None and prompt_file is None and model.startswith(PLAYGROUND):
        from diffalign.playground.captions import draw_captions

        return draw_captions(seed, samples, held_out=False)
    return read_prompts(prompts, prompt_file)
