"""One user's motion on one portrait. A Reenactor renders for any number of them, in turn."""

from __future__ import annotations

from collections.abc import Callable

from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime.published.tracker import PublishedTracker
from diffusionact.runtime.retarget import Retargeter, RetargetSettings
from diffusionact.runtime.source import Source
from diffusionact.runtime.tracker import Tracker


class Session:
    """What is remembered of one driver: the neutral face, the filters, what is held of a lost face.

    Nothing in it is shared with another session; it draws nothing and holds no network. Made by
    `Reenactor.session`; not to be shared between threads.
    """

    def __init__(
        self, source: Source, settings: RetargetSettings, tracker: Callable[[], Tracker]
    ) -> None:
        """tracker: the one in use, asked for only where source and driver carry face codes."""
        self.source = source
        self.retargeter = Retargeter(source.landmarks, settings)
        self._tracker = tracker
        self._held: Landmarks | None = None  # the last drawing from face codes

    def target(self, driver: Landmarks | None, pts_ns: int | None = None) -> Landmarks:
        """Return the landmarks to draw for a driver, crop px.

        driver: px of its own picture, None where no face was seen (as points that are no face, or
        not finite); pts_ns: its time, for smoothing. Where both faces carry codes, these are the
        source's shape with all else of the driver, and the last ones while no face is seen; else
        the driver's motion is retargeted, and eases to rest when the face stays away.
        """
        at_rest = self.source.landmarks
        coded = at_rest.codes is not None and (driver is None or driver.codes is not None)
        tracker = self._tracker() if coded else None
        if not isinstance(tracker, PublishedTracker):
            return self.retargeter.target(driver, pts_ns)
        if driver is not None and driver.is_face:
            self._held = tracker.mixed(at_rest, driver)
        return at_rest if self._held is None else self._held

    def forget(self) -> None:
        """Return nothing; what was held of a lost face is gone, the neutral face stays."""
        self._held = None

    def start(self, track: Track | None = None) -> None:
        """Return nothing; motion starts anew, measured from the neutral face of the track, or of
        the first second of what comes. A track of a single picture has nothing to compare itself
        with: its pose and expression are taken as they are."""
        self.forget()
        if track is None:
            self.retargeter.calibrate()
        elif len(track) > 1:
            self.retargeter.calibrate(track[i] for i in range(len(track)))
        else:
            self.retargeter.reset(forget_neutral=True)
