"""What keeps sample actors from running ahead of the trainer."""

import asyncio

from processes import STUCK_S

from pistoseg.training.progress import TrainingProgress


def test_waits_until_enough_samples_are_used():
    async def scenario() -> list[str]:
        progress, events = TrainingProgress(), []

        async def actor() -> None:
            await progress.wait(16)
            events.append("made")

        waiting = asyncio.create_task(actor())
        for used in (8, 15, 16):
            await progress.set_used(used)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            events.append(f"used {used}")
        await waiting
        return events

    assert asyncio.run(scenario()) == ["used 8", "used 15", "made", "used 16"]


def test_nothing_waits_for_samples_that_are_used_already():
    async def scenario() -> None:
        progress = TrainingProgress()
        await progress.wait(-40)  # the first blocks of a stream
        await progress.set_used(100)  # a resumed training
        await progress.wait(60)

    asyncio.run(asyncio.wait_for(scenario(), STUCK_S))
