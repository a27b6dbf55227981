"""OpenAI's images endpoint, or a server that speaks its language, as an image generator.

Random images come from the prompt of their class. A variation shows the service one candidate: a synthetic image that
votes have selected. Private images are never sent, nor anything else that has not been released with noise: generators
are never given any. The service has no strength of variation, so degrees have no effect.

The key is read from the environment (OPENAI_API_KEY) and written nowhere. Every answer is kept in the run's folder as
it arrives, so that a run that breaks off and resumes pays for none of them again. Needs pip install 'openai>=2'.
"""

import base64
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.convert import decode, resized, square_array
from data.spec import DataSpec, PublicData
from models.evolution.apis.api import Candidates, ImageAPI
from models.evolution.apis.prompts import check_prompt, class_prompts
from utils import distributed
from utils.errors import Unavailable, UserError
from utils.files import atomic, save_array
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field, check_positive
from utils.typed import changeable

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
SECTION = "model.api_params.openai"
VARIATIONS = ("edits", "variations")
MOST_PER_REQUEST = 10  # the service's limit
RESUME = "responses so far are kept: resume with --resume_exp"


@dataclass(frozen=True)
class OpenAIAPIConfig:
    model: str
    base_url: str | None  # None: $OPENAI_BASE_URL, else OpenAI's
    prompt: str  # "{}" stands for the class name
    prompts: list[str] | None  # one per class; None: `prompt`
    variation: str  # endpoint: edits (image and text) or variations (the image alone; dall-e-2)
    variation_prompt: str  # of edits; "{}" stands for the class name
    quality: str | None  # low, medium, high ..; None: the service's choice
    size: int  # pixels of the images that are requested and sent
    image_size: int  # pixels of the candidates that are kept
    images_per_request: int  # random images per request; variations come one by one
    max_requests: int = changeable()  # of the whole run
    max_retries: int = changeable()  # of one request, waiting longer each time
    timeout: float  # seconds for one answer

    def __post_init__(self) -> None:
        check_prompt("prompt", self.prompt)
        check_prompt("variation_prompt", self.variation_prompt)
        check_field(
            self.variation in VARIATIONS, "variation", self.variation, f"one of {', '.join(VARIATIONS)}"
        )
        per_request = self.images_per_request
        check_field(
            1 <= per_request <= MOST_PER_REQUEST,
            "images_per_request",
            per_request,
            f"from 1 to {MOST_PER_REQUEST}",
        )
        for name, least in (("size", 1), ("image_size", 1), ("max_requests", 0), ("max_retries", 0)):
            check_field(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        check_positive(self, "timeout")


@dataclass(frozen=True)
class Request:
    """One call of an endpoint ("generate", "edit", "create_variation") for the images of `rows`."""

    endpoint: str
    rows: np.ndarray
    arguments: dict[str, object]  # plain values; `image`: the bytes of a PNG file
    stream: str  # equal requests of different calls are different requests

    @property
    def key(self) -> str:
        content = repr((self.stream, self.endpoint, self.rows.tolist(), sorted(self.arguments.items())))
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class OpenAIAPI(ImageAPI):
    Config = OpenAIAPIConfig

    def __init__(self, config: OpenAIAPIConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self.prompts = class_prompts(config.prompt, config.prompts, spec)
        self._client = None
        self._responses: Responses | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.config.image_size, self.config.image_size

    def require_ready(self) -> None:
        self.client()

    def prepare(self, public: PublicData | None) -> None:
        """Nothing to learn; a missing library or key shows now."""
        self.client()

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        requests = []
        for label, prompt in enumerate(self.prompts):
            rows = np.flatnonzero(labels == label)
            for start in range(0, len(rows), self.config.images_per_request):
                part = rows[start : start + self.config.images_per_request]
                arguments = {"prompt": prompt, "n": len(part), **self._quality(), **self._common()}
                requests.append(Request("generate", part, arguments, rng_name))
        return Candidates(self._requested_images(requests, len(labels), "random images (openai)"), labels)

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        requests = []
        for row, (image, label) in enumerate(zip(candidates.images, candidates.labels, strict=True)):
            arguments = {"image": self._as_png(image), "n": 1, **self._common()}
            if self.config.variation == "edits":
                prompt = self.config.variation_prompt.format(self.spec.class_names[label])
                arguments |= {"prompt": prompt, **self._quality()}
            endpoint = "edit" if self.config.variation == "edits" else "create_variation"
            requests.append(Request(endpoint, np.array([row]), arguments, rng_name))
        images = self._requested_images(requests, len(candidates), "variations (openai)")
        return Candidates(images, candidates.labels)

    def _common(self) -> dict[str, object]:
        config = self.config
        arguments = {"model": config.model, "size": f"{config.size}x{config.size}"}
        if config.model.startswith("dall-e"):  # the others answer so unasked, and refuse the word
            arguments["response_format"] = "b64_json"
        return arguments

    def _quality(self) -> dict[str, str]:
        return {} if self.config.quality is None else {"quality": self.config.quality}

    def _as_png(self, image: np.ndarray) -> bytes:
        from PIL import Image

        pixels = resized(image[None], self.config.size)[0].transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def _requested_images(self, requests: list[Request], count: int, description: str) -> np.ndarray:
        """The images (count, *image_shape) of all requests, which the main process sends for all processes."""
        return distributed.from_main(lambda: self._send_requests(requests, count, description))

    def _send_requests(self, requests: list[Request], count: int, description: str) -> np.ndarray:
        responses = self._stored_responses()
        missing = [request for request in requests if request.key not in responses]
        left = self.config.max_requests - len(responses)
        if len(missing) > left:
            raise UserError(
                f"{SECTION}.max_requests: {self.config.max_requests} is too little: {len(responses)} are spent and "
                f"{len(missing)} more are needed now; no request was sent. Raise it, and resume"
            )
        for request in progress(missing, description, unit="request"):
            responses.keep(request.key, self._send(request))
        images = np.empty((count, *self.image_shape), np.uint8)
        for request in requests:
            images[request.rows] = responses[request.key]
        return images

    def _stored_responses(self) -> "Responses":
        if self._responses is None:
            folder = self.runtime.folder
            self._responses = Responses(None if folder is None else folder / "train" / "openai")
        return self._responses

    def _send(self, request: Request) -> np.ndarray:
        """(n, *image_shape) uint8. Raises UserError of one line; the service's message about a key is not repeated."""
        import openai

        arguments = dict(request.arguments)
        if "image" in arguments:
            arguments["image"] = ("image.png", arguments["image"], "image/png")
        try:
            response = getattr(self.client().images, request.endpoint)(**arguments)
        except openai.AuthenticationError as error:
            raise UserError(f"{KEY}: the service refuses the key (status {error.status_code})") from error
        except openai.APIConnectionError as error:
            raise UserError(f"{SECTION}: no answer from {self.client().base_url}; {RESUME}") from error
        except openai.APIError as error:
            message = error.body.get("message") if isinstance(error.body, dict) else None
            reason = " ".join(str(message or error.message).split())[:200]
            raise UserError(f"{SECTION}: {type(error).__name__} ({reason}); {RESUME}") from error
        return self._decoded(response.data or [], request)

    def _decoded(self, data: list, request: Request) -> np.ndarray:
        found = [base64.b64decode(item.b64_json) for item in data if item.b64_json]
        if len(found) != len(request.rows):
            raise UserError(
                f"{SECTION}: {len(request.rows)} images requested, {len(found)} received; {RESUME}"
            )
        pictures = [decode(content, f"an answer of {self.config.model}") for content in found]
        return np.stack([square_array(picture, self.config.image_size, 3) for picture in pictures])

    def client(self) -> "OpenAI":
        """The library's client, which retries on its own. Raises UserError if the library or the key is missing."""
        if self._client is None:
            try:
                import openai
            except ImportError as error:
                raise Unavailable(
                    "model.api=openai needs the openai library; pip install 'openai>=2'"
                ) from error
            if not os.environ.get(KEY):
                raise UserError(
                    f"{KEY}: not set; model.api=openai reads its key from this environment variable"
                )
            config = self.config
            self._client = openai.OpenAI(
                base_url=config.base_url, max_retries=config.max_retries, timeout=config.timeout
            )
        return self._client


class Responses:
    """Images that have been paid for, by the key of their request: files in a folder, or in memory without one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._images: dict[str, np.ndarray | None] = {}  # None: still on disk
        if folder is not None:
            self._images = {path.stem: None for path in folder.glob("[!.]*.npy")}

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, key: str) -> bool:
        return key in self._images

    def __getitem__(self, key: str) -> np.ndarray:
        images = self._images[key]
        return np.load(self._folder / f"{key}.npy") if images is None else images

    def keep(self, key: str, images: np.ndarray) -> None:
        if self._folder is None:
            self._images[key] = images
            return
        with atomic(self._folder / f"{key}.npy") as temporary:
            save_array(temporary, images)
        self._images[key] = None
