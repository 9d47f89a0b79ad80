// A picture that is dropped, pasted or chosen, and a mask that is painted over it.
//
// The value is {picture, mask}: the name under which the server keeps the picture, and the mask as a data: URL (white
// is drawn anew), or null. The file itself goes to Python once, with the event "picked".
sumuk.picture = (element, trigger, props, watch) => {
  const words = props.words;
  const make = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...inside);
    return made;
  };
  const root = element.querySelector(".picture");
  const choose = make("input", { type: "file", accept: props.accept, class: "unseen", tabindex: "-1", "aria-hidden": true });
  const drop = make("button", { type: "button", class: "drop", onclick: () => choose.click() }, words.drop);
  const told = make("p", { class: "notice trouble", role: "alert", hidden: true });
  const easel = make("div", { class: "easel", hidden: true });
  root.append(choose, drop, told, easel);

  const tell = (text) => {
    told.textContent = text || "";
    told.hidden = !text;
    root.classList.remove("busy");
  };
  const send = (file) => {
    if (!file) return;
    if (file.size > props.most) return tell(words.heavy);
    tell("");
    root.classList.add("busy");
    const reader = new FileReader();
    reader.onload = () => trigger("picked", { data: String(reader.result), name: file.name });
    reader.onerror = () => tell(String(reader.error));
    reader.readAsDataURL(file);
  };
  choose.addEventListener("change", () => {
    send(choose.files[0]);
    choose.value = "";
  });
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    root.classList.add("over");
  });
  root.addEventListener("dragleave", () => root.classList.remove("over"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("over");
    send(event.dataTransfer.files[0]);
  });
  root.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      send(event.clipboardData.files[0]);
    }
  });

  // The mask: strokes over what was there, drawn again from the start for each undo.
  let strokes = [];
  let canvas = null;
  let own = null; // the mask that we set ourselves, which need not be loaded again
  let erasing = false;
  let share = 0.08; // of the longer side
  const ink = "#1d1c1a";

  const pen = () => canvas.getContext("2d", { willReadFrequently: true });
  const apply = (stroke) => {
    const { width, height } = canvas;
    const tip = pen();
    tip.save();
    tip.strokeStyle = tip.fillStyle = ink;
    if (stroke.image) tip.drawImage(stroke.image, 0, 0, width, height);
    else if (stroke.clear) tip.clearRect(0, 0, width, height);
    else if (stroke.invert) {
      tip.globalCompositeOperation = "xor";
      tip.fillRect(0, 0, width, height);
    } else {
      tip.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
      tip.lineWidth = stroke.size;
      tip.lineCap = tip.lineJoin = "round";
      tip.beginPath();
      const [first, ...rest] = stroke.points;
      tip.moveTo(...first);
      for (const point of rest.length ? rest : [first]) tip.lineTo(...point);
      tip.stroke();
    }
    tip.restore();
  };
  const redraw = () => [{ clear: true }, ...strokes].forEach(apply);
  const save = () => {
    const { width, height } = canvas;
    const seen = pen().getImageData(0, 0, width, height);
    let some = false;
    for (let place = 0; place < seen.data.length; place += 4) {
      const on = seen.data[place + 3] > 127 ? 255 : 0;
      some = some || on > 0;
      seen.data.set([on, on, on, 255], place);
    }
    let mask = null;
    if (some) {
      const sheet = make("canvas");
      Object.assign(sheet, { width, height });
      sheet.getContext("2d").putImageData(seen, 0, 0);
      mask = sheet.toDataURL("image/png");
    }
    own = mask;
    props.value = { picture: shown, mask };
  };
  const add = (stroke) => {
    strokes.push(stroke);
    redraw();
    save();
  };
  // A mask as it came: where it is white, there is paint.
  const load = (mask) => {
    const image = new Image();
    image.onload = () => {
      const sheet = make("canvas");
      Object.assign(sheet, { width: canvas.width, height: canvas.height });
      const other = sheet.getContext("2d");
      other.drawImage(image, 0, 0, sheet.width, sheet.height);
      const seen = other.getImageData(0, 0, sheet.width, sheet.height);
      for (let place = 0; place < seen.data.length; place += 4) seen.data[place + 3] = seen.data[place];
      other.putImageData(seen, 0, 0);
      other.globalCompositeOperation = "source-in";
      other.fillStyle = ink;
      other.fillRect(0, 0, sheet.width, sheet.height);
      strokes = [{ image: sheet }];
      redraw();
    };
    image.src = mask;
  };
  const paintable = () => {
    let stroke = null;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * canvas.width;
      return [across, ((event.clientY - box.top) / box.height) * canvas.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      const size = Math.max(1, share * Math.max(canvas.width, canvas.height));
      stroke = { points: [point(event)], size, erase: erasing };
      apply(stroke);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!stroke) return;
      const pieces = event.getCoalescedEvents ? event.getCoalescedEvents() : [event];
      for (const each of pieces.length ? pieces : [event]) stroke.points.push(point(each));
      apply({ ...stroke, points: stroke.points.slice(-pieces.length - 1) });
    });
    const end = () => {
      if (stroke) add(stroke);
      stroke = null;
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
  };
  const tools = () => {
    const tool = (label, act, pressed) =>
      make("button", { type: "button", class: "act", onclick: act, ...(pressed === undefined ? {} : { "aria-pressed": pressed }) }, label);
    const brush = tool(words.brush, () => set(false), "true");
    const eraser = tool(words.eraser, () => set(true), "false");
    const set = (value) => {
      erasing = value;
      brush.setAttribute("aria-pressed", String(!value));
      eraser.setAttribute("aria-pressed", String(value));
    };
    const size = make("input", { type: "range", min: "1", max: "30", value: String(share * 100), oninput: () => (share = size.value / 100) });
    return make(
      "div", { class: "acts" }, brush, eraser, make("label", { class: "size" }, words.size, size),
      tool(words.undo, () => strokes.pop() && (redraw(), save())),
      tool(words.invert, () => add({ invert: true })),
      tool(words.clear, () => add({ clear: true })),
    );
  };
  const show = () => {
    drop.hidden = Boolean(shown);
    easel.hidden = !shown;
    easel.replaceChildren();
    canvas = null;
    strokes = [];
    erasing = false;
    if (!shown) return;
    const image = make("img", { src: `../page/kept/${shown}.png`, alt: words.label, draggable: "false" });
    const sheet = make("div", { class: "sheet" }, image);
    image.addEventListener("error", () => tell(words.gone));
    image.addEventListener("load", () => {
      sheet.style.setProperty("--ratio", `${image.naturalWidth} / ${image.naturalHeight}`);
      sheet.style.setProperty("--wide", image.naturalWidth / image.naturalHeight);
      if (!props.paint) return;
      canvas = make("canvas", { "aria-label": words.canvas, role: "img" });
      Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
      sheet.append(canvas);
      paintable();
      if (own) load(own);
    });
    const remove = () => {
      props.value = null;
      update();
    };
    const change = make(
      "div", { class: "acts" },
      make("button", { type: "button", class: "act", onclick: () => choose.click() }, words.other),
      make("button", { type: "button", class: "act", onclick: remove }, words.remove),
    );
    easel.append(sheet, ...(props.paint ? [tools(), make("p", { class: "hint" }, words.hint)] : []), change);
  };
  let shown = null; // the picture that is on the easel
  const update = () => {
    const value = props.value || {};
    tell(value.error);
    if ((value.picture || null) === shown && (value.mask || null) === own) return;
    shown = value.picture || null;
    own = value.mask || null;
    show();
  };
  watch("value", update);
  update();
};
