"""The static page and the Space in headless Chromium: what they say is what Python says.

Faces are drawn, and where ../shared has photographs, videos and YuNet, those are shown as well.
FER_TEST_MODEL names a model to test with in place of a tiny random one. Pictures of the pages are left in
FER_TEST_PICTURES, if that names a folder.
"""

import csv
import functools
import http.server
import io
import json
import os
import shutil
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import recognition
from conftest import SIZE, picture
from PIL import Image, ImageFilter
from test_app import PHOTO, ROOT, SHARED, YUNET, Squares, moving, processor, scene, with_crop, write_video

from modeling_fer import FerConfig, FerForImageClassification
from modeling_fer.cli.videos import predict_video, read_frames
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode, open_image
from modeling_fer.hub.export import export
from modeling_fer.learning.inference import class_names, load_model, predict_probabilities
from modeling_fer.video.faces import CROPS, Crop, Detector, Face, align
from modeling_fer.video.table import read_table

av = pytest.importorskip("av")
pytestmark = pytest.mark.browser
TINY = "FER_TEST_MODEL" not in os.environ
WEB = ROOT / "demo" / "web"
FILES = ("transformers.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
EXACT = 1e-4  # of probabilities, where both sides see the same pixels
NEAR = 0.06  # where the browser has decoded or compressed them
JERKY = 0.1  # where a detector has looked for the face in compressed ones
FILMS = {"single_face.mp4": 1, "people_pexels.mp4": 6}  # of each every so many frames, about 2.5 seconds


# --- Server, browser, model ---


@contextmanager
def served(folder):
    """Serve a folder on this machine; yields its address and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def chromium():
    """Return a starter of browsers whose camera shows a file of JPEGs."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync.sync_playwright() as playwright:

        def start(camera=None):
            flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
            flags += [f"--use-file-for-fake-video-capture={camera}"] if camera else []
            return playwright.chromium.launch(executable_path=path, args=flags)

        yield start


@contextmanager
def opened(browser, address, own=None):
    """A page that may ask nobody but its own server."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, permissions=["camera"])
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append((request.method, request.url)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(address)
    yield page
    context.close()
    outside = [url for _, url in requests if not url.startswith((own or address, "blob:", "data:"))]
    assert requests
    assert outside == []
    assert errors == []


def wait(page, condition):
    """Wait until a condition of JavaScript holds; the page's policy forbids it to evaluate one by itself."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def keep(page, name):
    """Leave a picture of the page for people to look at."""
    if folder := os.environ.get("FER_TEST_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model of stills and its image processor."""
    if not TINY:
        loaded, own = load_model(os.environ["FER_TEST_MODEL"])
        return with_crop(loaded), own
    import torch
    import transformers

    torch.manual_seed(3)
    encoder = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIZE,
        patch_size=8,
    )  # fmt: skip
    made = FerForImageClassification(FerConfig(encoder_config=encoder))
    torch.nn.init.normal_(made.classifier.weight)
    return with_crop(made.eval()), processor()


@pytest.fixture(scope="module")
def judge(model):
    """Return what gives an image's probabilities in Python, by class, as `fer predict` does."""
    net, own = model

    def probabilities(image):
        pixels = decode(image, own.size["height"])[None]
        values = predict_probabilities(net, pixels, Normalize(own.image_mean, own.image_std))[0]
        return dict(zip(class_names(net), values.tolist(), strict=True))

    return probabilities


def best(probabilities):
    return max(probabilities, key=probabilities.get)


@pytest.fixture(scope="module")
def two(judge):
    """Return two pictures of 320 pixels that have two expressions, as sure as may be."""
    shown = [picture(i, 0).resize((320, 320), Image.Resampling.BICUBIC) for i in range(8)]
    by_class = {}
    for image in shown:
        said = judge(image)
        by_class[best(said)] = max(by_class.get(best(said), (0, None)), (said[best(said)], id(image), image))
    surest = sorted(by_class.values(), key=lambda row: -row[0])
    assert len(surest) > 1, "the model says the same of all pictures"
    return [image for _, _, image in surest[:2]]


@pytest.fixture(scope="module", params=["drawn", "filmed"])
def source(request):
    """Return where faces come from: drawings, or photographs and videos."""
    if request.param == "filmed" and not (YUNET.is_file() and PHOTO.is_file()):
        pytest.skip(f"needs YuNet, photographs and videos in {SHARED}")
    return request.param


@pytest.fixture(scope="module")
def camera(source, two, tmp_path_factory):
    """Return a file that Chromium's camera shows in a loop, 30 images a second, and its different images."""
    if source == "filmed":
        shots = [shot for name, step in FILMS.items() for shot in filmed(PHOTO.parent / name)[::step]]
        times = 1
    else:
        shots, times = [Image.new("RGB", (640, 480)) for _ in two], 30
        for shot, image in zip(shots, two, strict=True):
            for left in (10, 330):  # `Squares` finds one in each half; the page looks at the middle
                shot.paste(image.resize((300, 300)), (left, 90))
    path = tmp_path_factory.mktemp("camera") / "camera.y4m"
    # Not as JPEGs: Chromium's fake camera takes their range of 0 to 255 for one of 16 to 235.
    with av.open(str(path), "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("rawvideo", rate=30)
        stream.width, stream.height, stream.pix_fmt = *shots[0].size, "yuv420p"
        for shot in shots:
            for _ in range(times):
                container.mux(stream.encode(av.VideoFrame.from_image(shot)))
    return path, shots


def filmed(path):
    """The frames of a video."""
    return [Image.fromarray(rgb) for _, _, rgb in read_frames(path, lambda *told: pytest.fail(str(told)))]


def agree(rows, expected, apart=NEAR):
    """Each row, expression and probabilities, is what Python says of a frame; no usual expression lacks."""
    for expression, found in rows:
        near = [said for said in expected if found == pytest.approx(said, abs=apart)]
        assert near, found
        assert expression in map(best, near)
    counts = Counter(map(best, expected))
    usual = {name for name, count in counts.items() if count > len(expected) / 4}
    assert usual <= {expression for expression, _ in rows}
    assert len(usual) > 1 or not TINY, "one expression of all frames would show nothing"


# --- The static page ---


@pytest.fixture(scope="module")
def site_folder(model, tmp_path_factory):
    """Return the page's folder, with the model's export beside it."""
    pytest.importorskip("onnxruntime")
    if missing := [name for name in FILES if not (WEB / "vendor" / name).is_file()]:
        pytest.skip(f"no {', '.join(missing)} in demo/web/vendor: sh demo/web/vendor.sh")
    root = tmp_path_factory.mktemp("site")
    for name in ("index.html", "app.js", "style.css"):
        shutil.copy(WEB / name, root)
    (root / "vendor").symlink_to(WEB / "vendor")
    net, own = model
    side = own.size["height"]
    faces = np.stack([np.asarray(picture(i, 0, side)).transpose(2, 0, 1) for i in range(8)])
    export(net, own, faces, root / "model", "onnx")
    (root / "free.html").write_text("<!doctype html><title>a page without a policy</title>")
    return root


@pytest.fixture(scope="module")
def site(site_folder):
    """Return the page's address."""
    with served(site_folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(chromium):
    started = chromium()
    yield started
    started.close()


def shown(page):
    """What the bars of the page say."""
    bars = page.locator("#bars li").all()
    return {bar.get_attribute("data-name"): float(bar.get_attribute("data-probability")) for bar in bars}


def until(page, expected):
    """Wait until the bars say what is expected."""
    wait(
        page,
        f"""() => Object.entries({json.dumps(expected)}).every(([name, value]) => {{
          const bar = document.querySelector(`#bars li[data-name=${{name}}]`);
          return Math.abs(bar.dataset.probability - value) < {EXACT};
        }})""",
    )


def show(page, name, data, kind="image/png"):
    page.wait_for_selector("body.ready")
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})
    page.wait_for_selector("#bars .best")


def middle(image, share=1.0):
    """The square in the middle of an image, as the page takes it."""
    side = round(share * min(image.size))
    x, y = ((length - side) // 2 for length in image.size)
    return image.crop((x, y, x + side, y + side))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_the_page_resizes_to_the_bit_as_pillow_does(site, browser):
    rng = np.random.default_rng(0)
    with opened(browser, site) as page:
        page.wait_for_selector("body.ready")
        for start, end in [
            (112, 48),
            (480, 96),
            (16, 112),
            (50, 50),
            (97, 48),
            (333, 7),
            (3, 64),
            (720, 224),
        ]:
            pixels = rng.integers(0, 256, (start, start, 4), dtype=np.uint8)
            pixels[..., 3] = 255
            found = page.evaluate(
                "([pixels, a, b]) => import('/app.js').then((app) => Array.from(app.resize(pixels, a, b)))",
                [pixels.ravel().tolist(), start, end],
            )
            resized = Image.fromarray(pixels[..., :3]).resize((end, end), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(np.array(found).reshape(end, end, 3), np.asarray(resized))


@pytest.mark.parametrize("size", [(SIZE, SIZE), (112, 112), (640, 480), (360, 640), (1021, 613)])
def test_a_photograph_has_the_probabilities_of_python(size, site, browser, judge):
    rng = np.random.default_rng(size)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    with opened(browser, site) as page:
        show(page, "noise.png", encoded(image))
        expected = judge(middle(image))
        assert shown(page) == pytest.approx(expected, abs=EXACT)
        assert page.inner_text("#best") == best(expected)


def test_what_the_square_holds_is_judged(site, browser, judge):
    image = Image.new("RGB", (600, 300))
    for i in range(2):
        image.paste(picture(2 + 3 * i, 0, 300).resize((300, 300)), (300 * i, 0))
    with opened(browser, site) as page:
        show(page, "two.png", encoded(image))
        assert shown(page) == pytest.approx(judge(middle(image)), abs=EXACT)
        box = page.locator("#square").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 2000, box["y"], steps=4)
        page.mouse.up()
        right = judge(image.crop((300, 0, 600, 300)))
        until(page, right)
        page.locator("#size").fill("50")
        smaller = judge(image.crop((375, 75, 525, 225)))
        until(page, smaller)
        for _ in range(200):
            page.locator("#square").press("ArrowLeft")
        page.locator("#size").fill("100")
        left = judge(image.crop((0, 0, 300, 300)))
        until(page, left)


@pytest.fixture
def with_crop_of(site_folder, site):
    """Return what gives the page's address with an export whose configuration states a crop, or none."""

    def address(crop):
        config = json.loads((site_folder / "model/config.json").read_text())
        config.pop("crop", None)
        folder = site_folder / f"model_{len(list(site_folder.iterdir()))}"
        shutil.copytree(site_folder / "model", folder)
        (folder / "config.json").write_text(json.dumps(config | ({"crop": crop} if crop else {})))
        return f"{site}?model=./{folder.name}"

    return address


@pytest.mark.parametrize("margin", [0.25, -0.1])
def test_the_models_margin_lies_around_the_frame_for_the_face(
    margin, site, with_crop_of, browser, model, judge
):
    """Put onto a detector's box, that frame makes the square the crop of `fer predict --detect`."""
    size, crop = model[1].size["height"], Crop("box", margin=margin)
    image = picture(4, 0, 300).resize((400, 300))
    image.paste(picture(1, 0, 130), (50, 0))
    rgb = np.asarray(image.filter(ImageFilter.GaussianBlur(15)))  # which both resize alike
    with opened(browser, with_crop_of(crop.to_dict()), own=site) as page:
        show(page, "face.png", encoded(Image.fromarray(rgb)))
        said = shown(page)
        frame, stage = (page.locator(name).bounding_box() for name in ("#face", "#stage"))
        guide = page.inner_text("#guide")
        keep(page, f"page_margin_{margin}")
    scale = 400 / stage["width"]
    box = [(frame[a] - stage[a]) * scale for a in "xy"] + [frame[a] * scale for a in ("width", "height")]
    side = 300 / (1 + 2 * margin)
    assert box == pytest.approx([200 - side / 2, 150 - side / 2, side, side], abs=3)
    face = Face(tuple(box), np.zeros((5, 2)), 1.0)
    expected, without = (judge(Image.fromarray(align(rgb, face, size, one))) for one in (crop, CROPS["box"]))
    assert said == pytest.approx(expected, abs=NEAR)
    assert said != pytest.approx(without, abs=NEAR) or not TINY
    assert "dashed frame holds one, forehead to chin" in guide


def test_the_guide_says_what_the_page_cannot_do(site, with_crop_of, browser):
    for crop, words in (
        (None, "does not say how the model's faces were cut out"),
        (CROPS["arcface112"].to_dict(), "turn the head upright, eyes at 47 % of its height, mouth at 83 %"),
        (Crop("arcface112", margin=0.5).to_dict(), "eyes at 48 % of its height, mouth at 66 %"),
    ):
        with opened(browser, with_crop_of(crop), own=site) as page:
            page.wait_for_selector("body.ready")
            assert words in page.text_content("#guide")


@pytest.mark.skipif(not PHOTO.is_file(), reason=f"needs photographs in {PHOTO.parent}")
def test_real_photographs_have_the_expressions_of_python(site, browser, judge):
    faces = sorted((PHOTO.parents[1] / "faces/images").glob("*.jpg"))[:12]
    apart = []
    with opened(browser, site) as page:
        for path in [PHOTO.parent / "single_face.jpg", *faces]:
            page.evaluate("document.querySelector('#stop').click()")
            show(page, path.name, path.read_bytes(), "image/jpeg")
            expected = judge(middle(open_image(path.read_bytes())))
            apart.append(max(abs(shown(page)[name] - value) for name, value in expected.items()))
            assert page.inner_text("#best") == best(expected)
        keep(page, "page_photograph")
    assert max(apart) < 0.02


def test_a_camera_has_the_expressions_of_python_and_a_table(site, source, chromium, judge, camera):
    path, shots = camera
    started = chromium(path)
    with opened(started, site) as page:
        page.wait_for_selector("body.ready")
        page.click("#camera")
        page.wait_for_selector("#history:visible")
        wait(page, "document.querySelector('#video').currentTime > 8")
        assert page.evaluate("(({videoWidth, videoHeight}) => [videoWidth, videoHeight])(video)") == [
            *shots[0].size
        ]
        keep(page, f"page_camera_{source}")
        with page.expect_download() as download:
            page.click("#save")
        header, *rows = list(csv.reader(Path(download.value.path()).read_text().splitlines()))
        page.click("#stop")
        assert page.locator("#history").is_hidden()
        assert page.evaluate("document.querySelector('#video').srcObject") is None
    started.close()
    expected = [judge(middle(shot, 0.6)) for shot in shots]
    assert header == ["seconds", "expression", *expected[0]]
    seconds = [float(row[0]) for row in rows]
    assert len(rows) > 10
    assert (np.diff(seconds) > 0).all()
    agree([(row[1], dict(zip(header[2:], map(float, row[2:]), strict=True))) for row in rows], expected)


LATE = """() => {
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  let missing = 2;
  CanvasRenderingContext2D.prototype.drawImage = function (source, ...rest) {
    if (source !== window.video || missing-- <= 0) draw.call(this, source, ...rest);
  };
}"""


def test_a_video_is_judged_while_it_plays(site, browser, judge, two, tmp_path):
    frames = [image.resize((240, 240)) for image in two for _ in range(20)]
    path = write_video(tmp_path / "video.mp4", frames, rate=5, layout="yuv420p")
    with opened(browser, site) as page:
        page.evaluate(LATE)  # as on a busy machine, where a video has begun and shows nothing yet
        show(page, "video.mp4", path.read_bytes(), "video/mp4")
        wait(page, "document.querySelector('#video').ended")
        keep(page, "page_video")
        with page.expect_download() as download:
            page.click("#save")
        _, *rows = list(csv.reader(Path(download.value.path()).read_text().splitlines()))
    firm = [row for row in rows if abs(float(row[0]) - 4) > 0.4]
    assert {row[1] for row in firm if float(row[0]) < 4} == {best(judge(two[0]))}
    assert {row[1] for row in firm if float(row[0]) > 4} == {best(judge(two[1]))}


SEND = """async (address) => {
  const said = [];
  const request = {method: 'POST', body: 'x', mode: 'no-cors'};
  await fetch(address + 'fetched', request).catch(() => said.push('fetch'));
  navigator.sendBeacon(address + 'beacon', 'x');
  const image = new Image();
  await new Promise((done) => {
    image.onload = done;
    image.onerror = done;
    image.src = address + 'image';
  });
  const form = document.createElement('form');
  form.method = 'post';
  form.target = 'aside';
  form.action = address + 'form';
  document.body.append(form);
  form.submit();
  await new Promise((done) => setTimeout(done, 500));
  return said;
}"""


def test_the_pages_policy_lets_nothing_out(site, browser, tmp_path):
    with served(tmp_path) as (elsewhere, asked):
        with opened(browser, site) as page:
            page.wait_for_selector("body.ready")
            assert page.evaluate(SEND.replace("address + 'image'", "'data:,'"), elsewhere) == ["fetch"]
            assert asked == []
        free = browser.new_context().new_page()  # the same without a policy: the server would have been asked
        free.goto(f"{site}free.html")
        free.evaluate(SEND, elsewhere)
        assert {"/fetched", "/beacon", "/image"} <= set(asked)
        free.context.close()


def test_what_is_no_picture_is_told_as_text(site, browser):
    name = "<img src=x onerror=alert(1)>.png"
    with opened(browser, site) as page:
        page.wait_for_selector("body.ready")
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": b"no picture"})
        page.wait_for_selector("#message.wrong")
        assert page.inner_text("#message") == f"{name} is no picture that this browser can read"
        assert page.locator("#message img").count() == 0
        page.set_input_files("#file", {"name": "x.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
        page.get_by_text("cannot read the video").wait_for()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("./none", "The model cannot be loaded"),
        ("https://example.org/model", "must be a folder of this site"),
    ],
)
def test_a_model_that_is_not_there_is_told(folder, message, site, browser):
    with opened(browser, f"{site}?model={folder}", own=site) as page:
        page.wait_for_selector("#message.wrong")
        assert message in page.inner_text("#message")
        assert page.locator("#camera").is_disabled()


# --- The Space ---


@pytest.fixture(scope="module")
def space(source, model):
    """Return the Space's address and what finds its faces: bright squares, or YuNet."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: make test-browser")
    import app

    detector = Detector if source == "filmed" else Squares
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Detector", detector)
        patch.setattr(recognition, "Detector", detector)
        page = app.build(recognition.Recognizer("<b>tiny</b>", *model, YUNET))
        assert isinstance(page, gradio.Blocks)
        _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
        yield address, detector
        page.close()


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.wait_for()
    return panel


def table_of(panel, tmp_path):
    """The table that a tab of the Space offers."""
    link = panel.locator("a[download]", has_text="").filter(visible=True).last
    link.wait_for()
    with panel.page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "table.csv")
    return read_table(tmp_path / "table.csv")


def image_of(kind, tmp_path):
    if kind is Squares:
        scene((4, 50, 100, 200), (1, 400, 200, 150), size=(640, 480)).save(tmp_path / "photo.png")
        return tmp_path / "photo.png"
    return PHOTO


def test_the_space_judges_a_photograph(space, source, browser, model, tmp_path):
    address, kind = space
    path = image_of(kind, tmp_path)
    with opened(browser, address) as page:
        page.get_by_text("<b>tiny</b>").wait_for()
        panel = tab(page, "Photograph")
        panel.locator("input[type=file]").set_input_files(path)
        found = table_of(panel, tmp_path)
        panel.get_by_text(f"{len(found)} faces.").wait_for()
        keep(page, f"space_photograph_{source}")
    net, own = model
    rgb = np.asarray(open_image(path.read_bytes()))
    faces = kind(YUNET).detect(rgb)
    assert len(found) == len(faces) > 1
    recognizer = recognition.Recognizer("", net, own, YUNET)
    for row, face in zip(found, faces, strict=True):
        assert row.box == pytest.approx(face.box, abs=1e-3)
        assert row.probabilities == pytest.approx(recognizer.judge(recognizer.cut(rgb, face)), abs=EXACT)


def test_the_space_judges_a_video(space, source, browser, model, tmp_path):
    address, kind = space
    path = PHOTO.parent / "single_face.mp4"
    if kind is Squares:
        path = write_video(tmp_path / "video.mp4", moving(empty=(5, 6)), layout="yuv420p")
    with opened(browser, address) as page:
        panel = tab(page, "Video")
        panel.locator("input[type=file]").set_input_files(path)
        found = table_of(panel, tmp_path)
        panel.get_by_text("frames show a face").wait_for()
        assert panel.locator("video").count() == 2
        keep(page, f"space_video_{source}")
    expected = list(predict_video(*model, read_frames(path, lambda what, reason: None), kind(YUNET)))
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert (row.frame, row.face, row.expression) == (other.frame, other.face, other.expression)
        assert row.probabilities == pytest.approx(other.probabilities, abs=EXACT)


def test_the_space_follows_a_camera(space, source, chromium, model, camera, tmp_path):
    address, kind = space
    path, shots = camera
    started = chromium(path)
    with opened(started, address) as page:
        panel = tab(page, "Camera")
        panel.get_by_text("Click to Access Webcam").click()
        panel.get_by_label("capture photo").click()
        page.wait_for_timeout(8000)
        panel.get_by_role("button", name="Timeline and table").click()
        found = table_of(panel, tmp_path)
        keep(page, f"space_camera_{source}")
    started.close()
    recognizer, detector = recognition.Recognizer("", *model, YUNET), kind(YUNET)
    expected = []
    for rgb in map(np.asarray, shots):
        face = recognizer.find(rgb, detector)[0]
        expected.append(recognizer.judge(recognizer.cut(rgb, face)))
    assert len(found) > 5
    agree([(row.expression, row.probabilities) for row in found], expected, JERKY)


def test_the_space_tells_what_it_cannot_use_as_text(space, browser, tmp_path, monkeypatch):
    address, _ = space
    Image.new("RGB", (320, 240)).save(tmp_path / "black.png")
    monkeypatch.setattr(recognition, "SECONDS", 0.5)
    (tmp_path / "<img src=x onerror=alert(1)>.mp4").write_bytes(b"no video")
    with opened(browser, address) as page:
        panel = tab(page, "Photograph")
        panel.locator("input[type=file]").set_input_files(tmp_path / "black.png")
        panel.get_by_text("No face.").wait_for()
        panel = tab(page, "Video")
        panel.locator("input[type=file]").set_input_files(tmp_path / "<img src=x onerror=alert(1)>.mp4")
        page.get_by_text("unreadable video").first.wait_for()
        assert page.locator("img[src=x]").count() == 0
    with opened(browser, address) as page:
        panel = tab(page, "Video")
        panel.locator("input[type=file]").set_input_files(write_video(tmp_path / "long.mp4", moving(12)))
        page.get_by_text("the video is longer than 0.5 s").first.wait_for()
