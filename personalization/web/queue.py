"""The queue of trainings moves on by itself: what waits starts when there is room, whether a page is open or not."""

import threading
import time

from ..errors import InputError


SECONDS = 2.0  # between two looks


def keep_moving(book, is_on):
    """Starts the thread that launches waiting runs of a `app_runs.RunBook`.

    Args:
        book: its queue.
        is_on: function of nothing, false when the server has ended.
    """

    def move():
        while is_on():
            try:
                book.advance()
            except (InputError, OSError, TimeoutError) as error:  # a full disk: it is tried again
                print(f"What waits could not be started: {error}")
            time.sleep(SECONDS)

    threading.Thread(target=move, daemon=True, name="queue of trainings").start()
