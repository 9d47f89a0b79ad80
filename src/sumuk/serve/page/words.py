"""All that the page says, in English and in Korean: one table. The engine's own sentences stay English.

Keys that begin with ``why:`` lead in a problem of that type (:data:`sumuk.serve.trouble.TITLES`); ``state:`` names a
job's state, ``about:`` a line of a receipt or of what ``inspect`` says, ``axis:`` an axis of the compare grid.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Language: TypeAlias = Literal["en", "ko"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

TABLE: dict[str, tuple[str, str]] = {
    "tagline": ("ink, run backwards", "먹을 거꾸로 흘려 그리다"),
    "language": ("한국어", "English"),
    "language-hint": ("이 페이지를 한국어로 보기", "Read this page in English"),
    "theme": ("Light or dark", "밝게 또는 어둡게"),
    "tab:create": ("Create", "그리기"),
    "tab:gallery": ("Gallery", "갤러리"),
    "tab:compare": ("Compare", "비교"),
    "tab:queue": ("Queue", "대기열"),
    "tab:workshop": ("Workshop", "작업실"),
    # Create.
    "prompt": ("Prompt", "프롬프트"),
    "prompt-hint": (
        "What to draw. A fox, 3d style · 여우, 3d",
        "무엇을 그릴까요? 여우, 3d · a fox, 3d style",
    ),
    "keys": (
        "Enter draws, Shift+Enter is a new line, Ctrl+↑ and Ctrl+↓ weigh the word under the cursor.",
        "Enter 그리기 · Shift+Enter 줄 바꿈 · Ctrl+↑/↓ 커서 아래 낱말의 가중치 조절",
    ),
    "negative": ("Negative prompt", "네거티브 프롬프트"),
    "negative-hint": ("What to keep away from", "그림에서 피하고 싶은 것"),
    "draw": ("Draw", "그리기"),
    "cancel": ("Cancel", "취소"),
    "steps": ("Steps", "단계 수"),
    "guidance": ("Guidance", "가이던스"),
    "width": ("Width", "너비"),
    "height": ("Height", "높이"),
    "swap": ("Swap width and height", "너비와 높이 바꾸기"),
    "seed": ("Seed", "시드"),
    "dice": ("A new seed each time", "매번 새 시드"),
    "reuse": ("The last picture's seed", "방금 그림의 시드"),
    "random": ("random", "무작위"),
    "usual": ("model's own", "모델 기본값"),
    "count": ("Pictures", "그림 수"),
    "solver": ("Solver", "솔버"),
    "grid": ("Step spacing", "단계 간격"),
    "part:model": ("Model", "모델"),
    "part:start": ("Start picture and mask", "시작 그림과 마스크"),
    "part:control": ("Control picture", "컨트롤 그림"),
    "part:hires": ("Second pass, larger", "크게 다시 그리기"),
    "part:further": ("Further settings", "추가 설정"),
    "part:replay": ("Settings from a picture", "그림에서 설정 가져오기"),
    "model": ("Model", "모델"),
    "vae": ("Autoencoder (VAE)", "오토인코더 (VAE)"),
    "own-vae": ("the model's own", "모델에 든 것"),
    "loras": ("Add a LoRA to the prompt", "프롬프트에 LoRA 넣기"),
    "loras-none": ("no LoRA on the shelf", "선반에 LoRA가 없습니다"),
    "refresh": ("Look again", "다시 읽기"),
    "strength": ("Strength: how much is drawn anew", "강도: 얼마나 새로 그릴지"),
    "mask_blur": ("Mask edge, pixels", "마스크 가장자리 흐림 (픽셀)"),
    "control": ("Control network", "컨트롤 네트워크"),
    "control-none": ("none: the model itself follows the picture", "없음: 모델이 그림을 직접 따름"),
    "control_weight": ("Weight", "가중치"),
    "hires": ("Draw a second pass at a larger size", "더 큰 크기로 한 번 더 그리기"),
    "hires_scale": ("Times larger", "확대 배율"),
    "hires_strength": ("Strength", "강도"),
    "hires_steps": ("Steps (0: as the first pass)", "단계 수 (0: 첫 번째와 같음)"),
    "further": ("As JSON, by the names of the API", "API 이름으로 쓴 JSON"),
    "further-hint": ('{"clip_skip": 2, "rescale": 0.7}', '{"clip_skip": 2, "rescale": 0.7}'),
    "replay-drop": (
        "Drop a PNG here, or choose one: its settings are taken over",
        "PNG를 여기에 놓거나 고르면 설정을 그대로 가져옵니다",
    ),
    "picture-drop": (
        "Drop a picture here, paste it, or choose one",
        "그림을 여기에 놓거나 붙여넣거나 고르세요",
    ),
    "picture-remove": ("Remove", "빼기"),
    "picture-other": ("Another", "다른 그림"),
    "paint-brush": ("Brush", "붓"),
    "paint-eraser": ("Eraser", "지우개"),
    "paint-size": ("Size", "굵기"),
    "paint-undo": ("Undo", "되돌리기"),
    "paint-clear": ("Clear", "모두 지우기"),
    "paint-invert": ("Invert", "반전"),
    "paint-hint": (
        "Paint over what is to be drawn anew; without paint, all of it is.",
        "새로 그릴 곳을 칠하세요. 칠하지 않으면 전체를 다시 그립니다.",
    ),
    "paint-canvas": ("Mask, to be painted on", "칠하는 마스크"),
    "too-heavy": ("This picture has more than {most} MB.", "그림이 {most} MB보다 큽니다."),
    "empty": ("The paper is still blank.", "아직 빈 종이입니다."),
    "empty-hint": ("Write a prompt and press Draw.", "프롬프트를 쓰고 그리기를 누르세요."),
    "waking": ("The server is getting its model ready …", "서버가 모델을 준비하고 있습니다 …"),
    "position": ("Waiting; {count} before it", "기다리는 중 · 앞에 {count}개"),
    "starting": ("About to begin …", "곧 시작합니다 …"),
    "progress": ("Step {step} of {steps}", "{steps}단계 중 {step}"),
    "drawn": ("{count} in {seconds} s", "{count} · {seconds}초"),
    "was-cancelled": ("Cancelled.", "취소했습니다."),
    "taken": ("Settings taken over: {names}.", "가져온 설정: {names}."),
    "left": ("Could not be taken over:", "가져오지 못한 것:"),
    "nothing-taken": ("Nothing could be taken over.", "가져올 설정이 없습니다."),
    "sent": ("The settings are in Create.", "설정을 그리기에 옮겼습니다."),
    "picture-gone": (
        "The start picture is no longer kept; choose it again.",
        "시작 그림이 남아 있지 않습니다. 다시 고르세요.",
    ),
    # Pictures.
    "download": ("Download PNG", "PNG 내려받기"),
    "send-all": ("All settings to Create", "모든 설정을 그리기로"),
    "send-init": ("As start picture", "시작 그림으로"),
    "send-mask": ("Repaint a part", "일부만 다시 그리기"),
    "receipt-json": ("Receipt as JSON", "영수증 (JSON)"),
    "gallery-empty": ("No picture yet.", "아직 그림이 없습니다."),
    "gallery-pick": ("Choose a picture to see what made it.", "그림을 고르면 만든 설정이 보입니다."),
    "older": ("Older", "이전 그림"),
    "newest": ("Newest", "최신 그림"),
    "picture-of": ("Picture, seed {seed}: {prompt}", "그림, 시드 {seed}: {prompt}"),
    # Compare.
    "compare-hint": (
        "Everything else is as it stands in Create. One value a line; numbers may also be split by commas, "
        "or be a range such as 10-30:5.",
        "나머지는 그리기의 설정을 따릅니다. 한 줄에 값 하나. 숫자는 쉼표로 나누거나 10-30:5처럼 범위로 써도 됩니다.",
    ),
    "across": ("Across", "가로축"),
    "down": ("Down", "세로축"),
    "values": ("Values", "값"),
    "axis:none": ("nothing", "없음"),
    "axis:strength": ("Strength", "강도"),
    "axis:lora": ("Weight of the LoRAs", "LoRA 가중치"),
    "compare": ("Draw the grid", "표 그리기"),
    "compare-empty": (
        "Choose two axes; the pictures come in as they are drawn.",
        "축을 고르면 그려지는 대로 표가 채워집니다.",
    ),
    "export": ("Export", "내보내기"),
    "sheet": ("Contact sheet (PNG)", "대조표 (PNG)"),
    "progress-grid": ("{done} of {all} drawn", "{all}장 중 {done}장"),
    "same-axes": (
        "Both axes are {axis}; choose another for one of them.",
        "두 축이 모두 {axis}입니다. 하나를 바꾸세요.",
    ),
    "no-values": ("{axis} has no values; write at least one.", "{axis}에 값이 없습니다. 하나 이상 쓰세요."),
    "not-a-number": (
        "{value} is no number; {axis} takes numbers.",
        "{value}은(는) 숫자가 아닙니다. {axis}에는 숫자를 쓰세요.",
    ),
    "too-many-cells": (
        "{count} pictures are too many for a grid; at most {most}.",
        "표에 {count}장은 너무 많습니다. 최대 {most}장입니다.",
    ),
    "no-lora": (
        "The prompt names no LoRA; add one in Create, or write <lora:name:1>.",
        "프롬프트에 LoRA가 없습니다. 그리기에서 넣거나 <lora:이름:1>이라고 쓰세요.",
    ),
    "no-start": (
        "Strength needs a start picture; choose one in Create.",
        "강도를 비교하려면 그리기에서 시작 그림을 고르세요.",
    ),
    # Queue.
    "queue-empty": ("Nothing is running or waiting.", "진행 중이거나 기다리는 작업이 없습니다."),
    "state:queued": ("waiting", "대기"),
    "state:running": ("drawing", "그리는 중"),
    "state:done": ("done", "완료"),
    "state:failed": ("failed", "실패"),
    "state:cancelled": ("cancelled", "취소됨"),
    "no-prompt": ("(no prompt)", "(프롬프트 없음)"),
    "pictures": ("{count} pictures", "그림 {count}장"),
    "ago": ("{minutes} min ago", "{minutes}분 전"),
    "now": ("just now", "방금"),
    "ended": ("Ended lately", "최근에 끝난 작업"),
    # Workshop.
    "shelf-none": (
        "This server has no shelf. Start it with a folder of model files to work on them: "
        "sumuk serve --shelf FOLDER",
        "이 서버에는 선반이 없습니다. 모델 파일이 든 폴더를 주고 시작하세요: sumuk serve --shelf 폴더",
    ),
    "work:inspect": ("Inspect", "살펴보기"),
    "work:merge": ("Merge", "합치기"),
    "work:prune": ("Prune", "가지치기"),
    "file": ("File", "파일"),
    "check": ("Also read every number (slower)", "모든 수를 읽어 확인 (느림)"),
    "first": ("First model", "첫째 모델"),
    "second": ("Second model", "둘째 모델"),
    "method": ("Method", "방법"),
    "rate": ("Rate: how much of the second", "비율: 둘째 모델의 몫"),
    "dtype": ("Stored as", "저장 형식"),
    "as-it-is": ("as it is", "그대로"),
    "new-name": ("Name of the new file", "새 파일 이름"),
    "new-name-hint": ("my-merge", "my-merge"),
    "weights": ("Weights", "가중치 종류"),
    "work-done": ("Done.", "끝났습니다."),
    "work-made": ("Done: {name} is on the shelf.", "끝났습니다: {name}이(가) 선반에 있습니다."),
    "work-failed": ("It did not work; below it says why.", "실패했습니다. 이유는 아래에 있습니다."),
    "work-runs": ("At work …", "작업 중 …"),
    "bench-taken": (
        "the workshop is at work already; wait for its end, or cancel it",
        "작업실에서 이미 작업 중입니다. 끝나기를 기다리거나 취소하세요",
    ),
    "bad-name": (
        "{name!r} is no name for a file: use letters, digits, dots, - and _, at most 100.",
        "{name!r}은(는) 파일 이름으로 쓸 수 없습니다. 글자, 숫자, 점, -, _ 만 100자까지 됩니다.",
    ),
    "name-taken": (
        "There is already a {name} on the shelf; choose another name.",
        "선반에 {name}이(가) 이미 있습니다. 다른 이름을 쓰세요.",
    ),
    "no-file": ("{name!r} is not on the shelf.", "{name!r}은(는) 선반에 없습니다."),
    "choose-file": ("Choose a file first.", "먼저 파일을 고르세요."),
    # Lines of receipts and of inspect.
    "about:licence": ("Licence", "라이선스"),
    "non-commercial": ("not for commercial use", "상업적 이용 불가"),
    "about:size": ("Size", "크기"),
    "about:adapters": ("Adapters", "어댑터"),
    "about:machine": ("Machine", "기계"),
    "about:job": ("Job", "작업"),
    "about:title": ("What it is", "종류"),
    "about:parts": ("Networks", "네트워크"),
    "about:missing": ("Missing", "없는 것"),
    "about:prediction": ("Predicts", "예측"),
    "about:resolution": ("Trained at", "학습 해상도"),
    "about:details": ("Details", "자세히"),
    "about:warnings": ("Warnings", "경고"),
    "about:unknown": ("Not recognised", "알 수 없음"),
    "unsure": ("not sure", "확실하지 않음"),
    "optional": ("optional", "없어도 됨"),
    # Problems.
    "why:bad-request": ("The request cannot be read", "요청을 읽을 수 없습니다"),
    "why:bad-value": ("A value is not allowed", "쓸 수 없는 값이 있습니다"),
    "why:bad-picture": ("The picture cannot be used", "그림을 쓸 수 없습니다"),
    "why:prompt-moderated": ("A safety check refused the prompt", "안전 검사에서 프롬프트가 거절되었습니다"),
    "why:content-moderated": ("A safety check withheld the picture", "안전 검사에서 그림이 보류되었습니다"),
    "why:no-token": ("A token is needed", "토큰이 필요합니다"),
    "why:foreign-origin": ("The request comes from another site", "다른 사이트에서 온 요청입니다"),
    "why:not-found": ("There is no such thing here", "찾을 수 없습니다"),
    "why:not-allowed": ("That is not possible here", "여기서는 할 수 없습니다"),
    "why:slow": ("The request did not arrive in time", "요청이 제때 도착하지 않았습니다"),
    "why:conflict": ("That is not possible now", "지금은 할 수 없습니다"),
    "why:gone": ("It is no longer kept", "더는 남아 있지 않습니다"),
    "why:no-length": ("The length must be said", "길이를 알려야 합니다"),
    "why:too-large": ("That is too large", "너무 큽니다"),
    "why:not-json": ("It is of another kind", "다른 종류의 내용입니다"),
    "why:foreign-host": ("The request is meant for another host", "다른 서버로 가야 할 요청입니다"),
    "why:other-body": ("It belongs to another request", "다른 요청의 것입니다"),
    "why:bad-model": ("A model file cannot be used", "모델 파일을 쓸 수 없습니다"),
    "why:too-many": ("Too much at once", "한꺼번에 너무 많습니다"),
    "why:cancelled": ("Cancelled", "취소되었습니다"),
    "why:internal": ("A fault of the server", "서버 오류입니다"),
    "why:not-here": ("It is not installed here", "여기에 설치되어 있지 않습니다"),
    "why:out-of-memory": ("There is not enough memory", "메모리가 부족합니다"),
    "why:unready": ("The server is not ready", "서버가 아직 준비되지 않았습니다"),
    "why:worker-lost": ("What drew it was lost", "그리던 프로세스가 사라졌습니다"),
    "why:deadline": ("It was not finished in time", "제때 끝나지 않았습니다"),
}


class Words:
    """The table in one language.

    Args:
        language: which.
    """

    def __init__(self, language: Language) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        """A text, with values put in."""
        text = TABLE[key][self._column]
        return text.format(**values) if values else text

    def count(self, number: int) -> str:
        """``1 picture`` or ``3 pictures``."""
        return "1 picture" if self.language == "en" and number == 1 else self("pictures", count=number)


def preferred(accepts: str) -> Language:
    """The language of an ``Accept-Language`` header (RFC 9110, 12.5.4); English where it names neither."""
    ranked: list[tuple[float, int, str]] = []
    for place, each in enumerate(accepts.split(",")[:20]):
        name, _, quality = each.strip().partition(";")
        try:
            weight = float(quality.strip().removeprefix("q=")) if quality else 1.0
        except ValueError:
            continue
        ranked.append((-weight, place, name.strip().lower().partition("-")[0]))
    for weight, _, name in sorted(ranked):
        if weight < 0:
            for language in LANGUAGES:
                if name == language:
                    return language
    return "en"
