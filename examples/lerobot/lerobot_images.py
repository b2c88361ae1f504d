"""Read the images of a LeRobot dataset: from mp4s with av, or from parquet files.

check_video counts a video's frames, read_pictures decodes them: one episode, one camera.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from lerobot_format import LEAVE_OUT, Episode, LeRobotSet, read_parquet, what_it_is
from PIL import Image

from machinery.images import decode_native
from machinery.rlds import DataError


def check_video(path: Path, episodes: Iterable[tuple[int, float, int]], fps: float
                ) -> tuple[str | None, int]:
    """Read a video's packets without decoding them -> its fault, or None, and its number of frames.
    episodes: (number, start in seconds, frames) of those that it should contain. A header can
    declare frames that do not exist."""
    if not path.exists():
        return f"{path}: missing, but the metadata list it (incomplete download?)", 0
    times, cut = [], False
    try:
        with av.open(str(path)) as container:
            (stream,) = container.streams.video[:1]
            for packet in container.demux(stream):
                cut |= packet.is_corrupt
                if packet.pts is not None and not packet.is_corrupt:
                    times.append((packet.pts - (stream.start_time or 0)) * float(stream.time_base))
    except (av.FFmpegError, ValueError) as error:
        if not times:
            return f"{path}: not a readable video: {what_it_is(path, error)}", 0
        cut = True
    times = np.sort(times)
    for number, start, length in episodes:
        frames = np.rint((times - start) * fps)
        if (found := len(np.intersect1d(frames, np.arange(length)))) < length:
            return (f"{path}: has {found} of the {length} frames of episode {number}"
                    + (", the file is cut off" if cut else "")
                    + f": download it again, or {LEAVE_OUT}"), 0
    return None, len(times)


def read_pictures(dataset: LeRobotSet, episode: Episode, camera: str, frames: np.ndarray
                  ) -> Iterator[av.VideoFrame | bytes]:
    """Yield the images of some frames (ascending numbers): decoded from a video, or an image's
    bytes."""
    if dataset.cameras[camera] == "video":
        yield from video_frames(*episode.videos[camera], dataset.fps, frames, episode.index)
        return
    table = read_parquet(episode.data, ["frame_index", camera],
                         filters=[("episode_index", "=", episode.index)])
    pictures = table.take(np.argsort(table["frame_index"].to_numpy(), kind="stable")[frames])[camera]
    for frame, picture in zip(frames, pictures, strict=True):
        if not (data := (picture.as_py() or {}).get("bytes")):
            raise DataError(f"{episode.data}: {camera} of frame {frame} of episode {episode.index} has no "
                            f"bytes: {LEAVE_OUT}")
        yield data


def video_frames(path: Path, start: float, fps: float, frames: np.ndarray, episode: int
                 ) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video at frames / fps seconds after `start`, decoded in order."""
    wanted, place = frames.tolist(), 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # each core has its own episode
            first, seconds = stream.start_time or 0, float(stream.time_base)
            # seek the key frame that begins an episode, not the one before: half a frame later
            if start > 0:
                container.seek(first + int((start + 0.5 / fps) / seconds), stream=stream)
            for frame in container.decode(stream):
                number = round(((frame.pts - first) * seconds - start) * fps)
                if number > wanted[place] or frame.is_corrupt:
                    break
                if number == wanted[place]:
                    yield frame
                    place += 1
                    if place == len(wanted):
                        return
    except av.FFmpegError:
        pass  # raises the same error as a skipped frame, below
    raise DataError(f"{path}: frame {wanted[place]} of episode {episode} cannot be decoded: {LEAVE_OUT}")


def as_array(picture: av.VideoFrame | bytes, size: int) -> np.ndarray:
    """An image -> (size, size, 3) uint8, resized with Lanczos, ignoring the aspect ratio; size 0:
    keep its size."""
    if isinstance(picture, bytes):
        # of 16 bits, the upper 8, as elsewhere in this project
        image = Image.fromarray(decode_native(picture))
        return np.array(image.resize((size, size), Image.Resampling.LANCZOS) if size else image)
    sides = {"width": size, "height": size, "interpolation": "LANCZOS"} if size else {}
    return picture.to_ndarray(format="rgb24", **sides)
