// What the page does in the browser by itself: light and dark, the language, the keys, what is remembered.
window.sumuk = {};
{
  // The framework's own words follow the browser's language; here they follow the page's.
  const speaks = document.currentScript.dataset.speaks;
  Object.defineProperty(navigator, "language", { get: () => speaks });
}

(() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const shown = () => localStorage.getItem("sumuk.theme") || (system.matches ? "dark" : "light");
  const paint = () => {
    const dark = shown() === "dark";
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    if (document.body && document.body.classList.contains("dark") !== dark) document.body.classList.toggle("dark", dark);
  };
  // The framework sets the class by the system alone, when it likes; ours is the last word.
  const follow = () => {
    paint();
    new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  if (document.body) follow();
  else document.addEventListener("DOMContentLoaded", follow);
  system.addEventListener("change", paint);

  sumuk.head = (element) => {
    element.addEventListener("click", (event) => {
      if (event.target.closest("[data-theme]")) {
        localStorage.setItem("sumuk.theme", shown() === "dark" ? "light" : "dark");
        paint();
      }
      const language = event.target.closest("[data-language]");
      if (language) {
        document.cookie = `sumuk-language=${language.dataset.language};path=/;max-age=31536000;SameSite=Lax`;
      }
    });
  };
})();

// A button that shows a sign alone says at the pointer what it does.
document.addEventListener("mouseover", (event) => {
  const tool = event.target.closest && event.target.closest(".tool");
  if (tool) tool.title = tool.textContent.trim();
});

// What Python wrote: it is told which button was pressed, and asked again for what is not at its end (data-again, in
// milliseconds) while somebody looks and the server answers.
sumuk.acts = (element, trigger, watch) => {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act]");
    if (!button) return;
    trigger("act", { ...button.dataset });
    const shows = button.dataset.shows && document.getElementById(button.dataset.shows);
    if (shows && shows.getBoundingClientRect().top < 0) shows.scrollIntoView({ behavior: "smooth" });
  });
  let round = 0;
  const wait = (time) => new Promise((done) => setTimeout(done, time));
  const answers = () => fetch("../livez").then((answer) => answer.ok, () => false);
  const arm = async () => {
    const own = ++round;
    const place = element.querySelector("[data-again]");
    if (!place) return;
    await wait(Number(place.dataset.again));
    while (own === round && element.isConnected) {
      const seen = element.checkVisibility() && document.visibilityState === "visible";
      if (seen && (await answers()) && own === round) {
        trigger("again", {});
        await wait(8000); // the answer begins another round; if it is lost, it is asked for once more
      } else await wait(1000);
    }
  };
  watch("value", arm);
  arm();
};

// The stage: steps and previews of a job go in as its events tell them; Python writes the rest.
sumuk.stage = (element, trigger, watch) => {
  sumuk.acts(element, trigger, watch);
  let source = null;
  let job = "";
  let previews = {};
  const end = () => {
    if (source) source.close();
    [source, job, previews] = [null, "", {}];
  };
  const show = (image) => {
    const dry = element.querySelector(`.dry[data-image="${image}"]`);
    if (!dry || !previews[image]) return;
    const picture = dry.firstElementChild || dry.appendChild(document.createElement("img"));
    Object.assign(picture, { className: "wet", alt: "", src: previews[image] });
  };
  const look = () => {
    const stage = element.querySelector("[data-job]");
    if (!stage) return end();
    if (stage.dataset.job === job) return Object.keys(previews).forEach(show);
    end();
    job = stage.dataset.job;
    const own = (source = new EventSource(`../api/jobs/${job}/events`));
    const on = (kind, act) =>
      own.addEventListener(kind, (event) => {
        if (!element.isConnected || own !== source) return own.close();
        act(JSON.parse(event.data));
      });
    let furthest = 0;
    on("step", ({ step, steps }) => {
      furthest = Math.max(furthest, step);
      const bar = element.querySelector("progress");
      const says = element.querySelector("[data-says]");
      if (!bar) return trigger("again", {}); // it has begun: the bar comes from Python
      Object.assign(bar, { value: furthest, max: steps });
      says.textContent = says.dataset.says.replace("{step}", furthest).replace("{steps}", steps);
    });
    on("preview", ({ image, jpeg }) => {
      previews[image] = `data:image/jpeg;base64,${jpeg}`;
      show(image);
    });
    for (const kind of ["picture", "lost"]) on(kind, () => trigger("again", {}));
    on("end", () => {
      end();
      trigger("again", {});
    });
  };
  watch("value", look);
  look();
};

// The fields of Create, kept in this browser.
sumuk.keep = (names, values) => {
  const form = Object.fromEntries(names.map((name, place) => [name, values[place]]));
  clearTimeout(sumuk.keeping);
  const write = () => {
    try {
      localStorage.setItem("sumuk.form", JSON.stringify(form));
    } catch (error) {
      console.warn("the settings are too large to be kept", error);
    }
  };
  sumuk.written = write;
  sumuk.keeping = setTimeout(write, 150);
};
window.addEventListener("pagehide", () => sumuk.written && sumuk.written());

// Weights: (word:1.1), a twentieth a press, as A1111's page does it.
sumuk.weigh = (text, start, end, by) => {
  const number = String.raw`([-+]?(?:\d+\.?\d*|\.\d+))`;
  const shown = (value) => String(Math.round(value * 100) / 100);
  const put = (from, to, piece, first, last) => ({ from, to, piece, start: first, end: last });
  const inTag = (() => {
    const open = text.lastIndexOf("<", start - (text[start] === "<" ? 0 : 1));
    const close = text.indexOf(">", Math.max(open, end - 1));
    if (open < 0 || close < 0 || text.slice(open + 1, close).includes("<") || close < end - 1) return null;
    const found = new RegExp(String.raw`^<\w+:[^:>]+:${number}`).exec(text.slice(open, close + 1));
    return found && { from: open + found[0].length - found[1].length, to: open + found[0].length, at: Number(found[1]) };
  })();
  if (inTag) {
    const piece = shown(inTag.at + by);
    return put(inTag.from, inTag.to, piece, start, start);
  }
  const weighted = (from, to) => {
    const tail = new RegExp(`^:${number}\\)`).exec(text.slice(to));
    return text[from - 1] === "(" && text[from - 2] !== "\\" && tail ? { value: Number(tail[1]), length: tail[0].length } : null;
  };
  if (start === end) {
    // Inside brackets that have a weight already: the innermost one. Else the word under the cursor.
    let depth = 0;
    let from = -1;
    for (let place = start - 1; place >= 0; place--) {
      if (text[place - 1] === "\\") continue;
      if (text[place] === ")") depth++;
      if (text[place] === "(" && depth-- === 0) {
        from = place + 1;
        break;
      }
    }
    const tail = from < 0 ? -1 : text.slice(start).search(new RegExp(`^[^()]*?:${number}\\)`));
    if (from >= 0 && tail === 0) {
      const body = text.slice(from, text.indexOf(")", start));
      [start, end] = [from, from + body.lastIndexOf(":")];
    } else {
      const ends = /[\s.,\\/!?%^*;:{}=`~()[\]|<>]/;
      while (start > 0 && !ends.test(text[start - 1])) start--;
      while (end < text.length && !ends.test(text[end])) end++;
    }
  }
  while (start < end && /\s/.test(text[start])) start++;
  while (end > start && /\s/.test(text[end - 1])) end--;
  if (start === end) return null;
  const known = weighted(start, end);
  const value = Math.round(((known ? known.value : 1) + by) * 100) / 100;
  const inside = text.slice(start, end);
  const [from, to] = known ? [start - 1, end + known.length] : [start, end];
  if (value === 1) return put(from, to, inside, from, from + inside.length);
  return put(from, to, `(${inside}:${shown(value)})`, from + 1, from + 1 + inside.length);
};

(() => {
  const areas = "#prompt textarea, #negative textarea";
  const press = (id) => {
    const button = document.querySelector(`#${id}`);
    if (button && !button.disabled && button.offsetParent) button.click();
  };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return; // a Korean syllable is being written
    const area = event.target.closest && event.target.closest(areas);
    const command = event.ctrlKey || event.metaKey;
    if (area && command && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      event.preventDefault();
      const by = event.key === "ArrowUp" ? 0.05 : -0.05;
      const change = sumuk.weigh(area.value, area.selectionStart, area.selectionEnd, by);
      if (!change) return;
      area.setSelectionRange(change.from, change.to);
      // So that undo takes it back; where it is not to be had, the text is set.
      if (!document.execCommand("insertText", false, change.piece)) {
        area.setRangeText(change.piece);
        area.dispatchEvent(new Event("input", { bubbles: true }));
      }
      area.setSelectionRange(change.start, change.end);
    } else if (event.key === "Enter" && event.target.closest && event.target.closest("#studio")) {
      if (area) event.stopPropagation();
      if (command || (area && !event.shiftKey)) {
        event.preventDefault();
        press("draw");
      }
    }
  }, true);
  // The framework takes Shift+Enter for sending, and no new line would come of it.
  document.addEventListener("keypress", (event) => {
    if (event.key === "Enter" && event.target.closest && event.target.closest(areas)) event.stopPropagation();
  }, true);
})();
