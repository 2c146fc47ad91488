"""The page in a browser, as a person uses it. Screenshots are kept in the test's folder."""

import contextlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from tests.infer.service.conftest import OPERATOR, astronaut, mirrored  # noqa: F401
from tests.infer.service.programs import program

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Person:
    """Somebody before the page."""

    def __init__(self, page, shots):
        self.page, self.shots = page, shots

    def wait(self, where, text, seconds=25):
        self.page.locator(where).get_by_text(text).first.wait_for(timeout=seconds * 1000)

    def bring(self, where, *files):
        chosen = self.page.locator(f"{where} input[type=file]")
        chosen.set_input_files([str(file) for file in files])

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()
        self.page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
        self.page.wait_for_timeout(500)  # what is in it is made now

    def look(self, name):
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def server():
    with program("ui") as (process, client):
        yield client
        process.terminate()
        assert process.wait(30) == 0


@contextlib.contextmanager
def before(server, shots):
    """Somebody before the page of a server; nothing is asked of any other host."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(str(server.base_url))
        page.locator("#draw").wait_for(timeout=60_000)
        yield Person(page, shots)
        browser.close()
        own = (str(server.base_url).rstrip("/"), "data:", "blob:")
        assert [url for url in asked if not url.startswith(own)] == []


@pytest.fixture
def person(server, tmp_path):
    with before(server, tmp_path) as found:
        yield found


def shown(person, server, where="#pictures", number=0):
    """The pixels of the newest picture, as the browser has them."""
    url = person.page.locator(f"{where} img").nth(number).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(server.get(url).content)))


def test_a_portrait_of_the_astronaut(person, server, astronaut, tmp_path):  # noqa: F811
    page = person.page
    person.bring("#photos-0", astronaut, astronaut.with_suffix(".points.json"))
    person.wait("#photos-0-faces", "astronaut.png: taken")
    person.look("seen")
    page.click("#draw")
    person.wait("#state", "Done: 1 picture")
    person.look("drawn")
    # The same request on the command line: the same bits.
    prompt = page.get_by_label("Prompt (one on each line)").input_value()
    words = ["--prompt", prompt, "--photo", astronaut]
    for name in ("base", "adapter", "encoder"):
        words += [f"--{name}", OPERATOR[name]]
    words += ["--sampler", "ddim", "--steps", 25, "--guidance", 3, "--out", tmp_path / "out"]
    assert main(["generate", *map(str, words)]) == 0
    (path,) = (tmp_path / "out").iterdir()
    np.testing.assert_array_equal(shown(person, server), Image.open(path))
    # A second one is cancelled on its way.
    page.get_by_label("number input for Steps").first.fill("200")
    page.keyboard.press("Tab")
    page.click("#draw")
    person.wait("#state", "Drawing: step")
    page.click("#cancel")
    person.wait("#state", "Cancelled.")
    person.look("cancelled")
    # Its settings come back from the first.
    person.tab("Read back")
    person.bring("#made-here", path)
    page.locator("#record").get_by_text("sampler").first.wait_for()
    page.get_by_role("button", name="Use these settings").click()
    person.wait("#read-state", "Portrait has these settings.")
    person.look("read")
    person.tab("Portrait")
    assert page.get_by_label("number input for Steps").first.input_value() == "25"


def test_the_best_of_several_on_one_sheet(person, server, astronaut, tmp_path):  # noqa: F811
    page = person.page
    person.bring("#photos-0", astronaut, astronaut.with_suffix(".points.json"))
    person.wait("#photos-0-faces", "astronaut.png: taken")
    page.get_by_label("number input for Count").first.fill("3")
    page.get_by_label("number input for Steps").first.fill("4")
    page.get_by_role("button", name="Advanced").first.click()
    page.get_by_label("Best").fill("2")
    page.get_by_label("Sheet").check()
    page.click("#draw")
    person.wait("#state", "Done: 2 pictures")
    person.wait("#pictures", "all on one sheet")
    person.look("best")
    prompt = page.get_by_label("Prompt (one on each line)").input_value()
    words = ["--prompt", prompt, "--photo", astronaut]
    for name in ("base", "adapter", "encoder"):
        words += [f"--{name}", OPERATOR[name]]
    words += ["--sampler", "ddim", "--steps", 4, "--guidance", 3, "--out", tmp_path / "out"]
    assert main(["generate", *map(str, [*words, "--count", 3, "--best", 2, "--sheet"])]) == 0
    paths = sorted((tmp_path / "out").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) == 3
    for number, path in enumerate(paths):
        np.testing.assert_array_equal(shown(person, server, number=number), Image.open(path))


def test_two_people_where_they_are_painted(person, server, astronaut):  # noqa: F811
    page = person.page
    drawn = []

    def draw(name):
        page.click("#draw")
        person.wait("#state", "Done: 1 picture", 60)
        page.wait_for_timeout(300)
        drawn.append(shown(person, server))
        person.look(name)

    def paint(number, x):
        page.locator(f"#place-{number} button[aria-label=Brush]").first.click()
        canvas = page.locator(f"#place-{number} canvas").last
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        box = canvas.bounding_box()
        at = box["x"] + x * box["width"]
        for y in (0.15, 0.9):
            page.mouse.move(at, box["y"] + y * box["height"], steps=8)
            page.wait_for_timeout(200)
            page.mouse.down()
        page.mouse.up()
        page.wait_for_timeout(500)

    page.locator("#made-up button").nth(3).click()
    page.locator("#photos-0-faces img").wait_for()
    page.get_by_label("number input for Steps").first.fill("10")
    page.get_by_role("button", name="More people in the picture").click()
    page.get_by_role("button", name="Person 2").click()
    person.bring("#photos-1", astronaut, astronaut.with_suffix(".points.json"))
    person.wait("#photos-1-faces", "astronaut.png: taken")
    draw("side-by-side")
    page.get_by_role("button", name="Where each is drawn").click()
    page.wait_for_timeout(500)
    paint(0, 0.65)
    page.click("#draw")
    person.wait("#state", "Paint where each person is drawn, or paint nothing")
    paint(1, 0.35)
    person.look("painted")
    draw("two-painted")
    # Where nobody is painted, in the other's band, both differ from side by side.
    assert (drawn[0] != drawn[1]).mean() > 0.2


def test_few_steps_with_a_lora(astronaut, tmp_path):  # noqa: F811
    """A LoRA that diffusers wrote; the settings that the button makes are those of the record."""
    lora = made_lora(tmp_path / "lora")
    models = [word for name in ("base", "adapter", "encoder") for word in _models(name)]
    options = ["--backend", "torch", "--lora", f"{lora}=1"]
    pictures = []
    for more in ([], options[2:]):
        with program("ui", *models, *options[:2], *more) as (_, server):  # noqa: SIM117
            with before(server, tmp_path) as person:
                page = person.page
                person.bring("#photos-0", astronaut, astronaut.with_suffix(".points.json"))
                person.wait("#photos-0-faces", "astronaut.png: taken")
                prompt = page.get_by_label("Prompt (one on each line)")
                prompt.fill("a portrait of a person")
                button = page.get_by_role("button", name="Few steps")
                page.get_by_role("button", name="Advanced").first.click()
                page.wait_for_timeout(500)
                if more:
                    button.click()
                    steps = page.get_by_label("number input for Steps").first
                    for _ in range(50):
                        if steps.input_value() == "6":
                            break
                        page.wait_for_timeout(100)
                    assert steps.input_value() == "6"
                else:  # the same settings, by hand
                    assert button.count() == 0
                    page.get_by_label("number input for Steps").first.fill("6")
                    page.get_by_label("number input for Guidance").first.fill("1")
                    page.get_by_label("Sampler").first.click()
                    page.get_by_role("option", name="lcm").click()
                page.click("#draw")
                person.wait("#state", "Done: 1 picture", 60)
                page.wait_for_timeout(300)
                person.look(f"few-steps-{len(pictures)}")
                pictures.append(shown(person, server))
                url = page.locator("#pictures img").first.get_attribute("src")
                image = Image.open(io.BytesIO(server.get(url).content))
                record = json.loads(image.text["fact_jax"])
                assert (record["sampler"], record["steps"]) == ("lcm", 6)
                assert record["guidance"] == 1.0
                assert record["loras"] == (f"{lora}=1" if more else None)
    assert (pictures[0] != pictures[1]).mean() > 0.2


def _models(name):
    return f"--{name}", OPERATOR[name]


def made_lora(folder):
    """A small random LoRA for the miniature's UNet, saved by diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(OPERATOR["base"], subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0"]))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def test_a_template_is_redrawn(person, server, astronaut):  # noqa: F811
    person.page.locator("#made-up button").nth(2).click()
    person.page.locator("#photos-0-faces img").wait_for()
    person.tab("Template")
    person.bring("#template", astronaut, astronaut.with_suffix(".points.json"))
    person.page.locator("#template-faces img").wait_for()
    person.page.click("#redraw")
    person.wait("#redraw-state", "Done: 1 picture")
    person.page.locator("#redrawn img").first.wait_for()
    person.look("redrawn")


def test_several_templates_at_once(person, server, astronaut, tmp_path):  # noqa: F811
    other = mirrored(astronaut, tmp_path / "mirrored.png")
    person.bring("#photos-0", astronaut, astronaut.with_suffix(".points.json"))
    person.wait("#photos-0-faces", "astronaut.png: taken")
    person.tab("Template")
    templates = astronaut, other
    beside = [path.with_suffix(".points.json") for path in templates]
    person.bring("#template", *templates, *beside)
    person.wait("#template-faces", "mirrored.png: taken")
    person.page.get_by_label("number input for Steps").locator("visible=true").fill("4")
    person.page.click("#redraw")
    person.wait("#redraw-state", "Done: 2 pictures")
    person.page.locator("#redrawn-all img").nth(1).click()
    person.page.wait_for_timeout(500)
    person.look("redrawn-several")
    words = ["redraw", *templates, "--photo", astronaut, "--out", tmp_path / "out"]
    for name in ("base", "adapter", "encoder"):
        words += [f"--{name}", OPERATOR[name]]
    words += ["--sampler", "ddim", "--steps", 4, "--guidance", 3]
    assert main([str(word) for word in words]) == 0
    for number, path in enumerate(templates):
        wanted = Image.open(tmp_path / "out" / f"{path.stem}-redrawn.png")
        np.testing.assert_array_equal(shown(person, server, "#redrawn-all", number), wanted)


def test_a_face_is_marked_by_the_keyboard(person, astronaut):  # noqa: F811
    person.bring("#photos-0", astronaut)
    person.wait("#photos-0-mark", "Click the points")
    points = person.page.locator("#photos-0-points textarea, #photos-0-points input").first
    points.fill("203 100.8 246.3 102.8 224.3 126 203.4")
    points.press("Enter")
    person.wait("#photos-0-said", "Ten numbers are wanted")
    points.fill("203 100.8 246.3 102.8 224.3 126 203.4 139.2 243.9 140.3")
    points.press("Enter")
    person.wait("#photos-0-faces", "astronaut.png: taken")
    person.look("marked")


def test_broken_files_are_one_sentence(person, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing" * 20)
    person.bring("#photos-0", tmp_path / "torn.png")
    person.wait("#photos-0-said", "torn.png: photo is not a picture that can be read")
    person.look("broken")
    person.page.click("#draw")
    person.wait("#state", "Choose a person or bring a photo first.")
    person.tab("Read back")
    person.bring("#made-here", tmp_path / "torn.png")
    person.wait("#read-state", "torn.png is not a picture that can be read")


def test_pictures_have_texts_and_all_is_in_reach(person):
    page = person.page
    page.locator("#made-up button").first.focus()
    page.keyboard.press("Enter")
    page.locator("#photos-0-faces img").wait_for()
    images = page.locator("img:visible")
    assert all(images.nth(i).get_attribute("alt") for i in range(images.count()))
    page.locator("#draw").focus()
    page.keyboard.press("Enter")
    person.wait("#state", "Done: 1 picture")
    axe = os.environ.get("AXE_CORE")  # the path of axe.min.js, where somebody has it
    if axe:
        page.add_script_tag(path=axe)
        found = page.evaluate("axe.run()")["violations"]
        serious = {each["id"] for each in found if each["impact"] in ("serious", "critical")}
        # Gradio's own: its upload button holds the file input, its thumbnails are numbered.
        assert serious <= {"nested-interactive", "label-content-name-mismatch"}, found
