"use strict";
// Filter, search, sort, copy, download, highlight. The page is whole without it. Text is only ever set as text.
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("scripted");

  // The table of answers
  const body = $("#rows"), page = 12;
  let limit = page;
  if (body) {
    const rows = all("tr", body).map((tr, i) => ({ tr, i, text: null }));
    const method = () => ($("input[name=pick]:checked") || { value: "" }).value;
    const cell = (row) => $(".of-" + method(), row.tr);
    const difference = (row) => {
      const c = cell(row), d = c ? c.dataset.d : "null";
      return d === "null" ? NaN : Number(d);
    };
    const searched = (row) => {
      const c = cell(row), side = row.tr.children;
      return (side[0].textContent + "\n" + side[1].textContent + "\n" + (c ? c.textContent : "")).toLowerCase();
    };
    const apply = () => {
      const wanted = $("#filter").value, order = $("#sort").value;
      const words = $("#search").value.toLowerCase().trim();
      let shown = rows.filter((row) => {
        const c = cell(row);
        return c && (!wanted || c.dataset.q === wanted) && (!words || searched(row).includes(words));
      });
      if (order !== "order") {
        const sign = order === "up" ? -1 : 1;
        shown = shown.map((row) => [difference(row), row]).sort((a, b) => {
          const missing = isNaN(a[0]) - isNaN(b[0]);
          return missing || sign * (a[0] - b[0]) || a[1].i - b[1].i;
        }).map((pair) => pair[1]);
      }
      for (const row of rows) row.tr.hidden = true;
      const fragment = document.createDocumentFragment();
      for (const row of shown.slice(0, limit)) { row.tr.hidden = false; fragment.append(row.tr); }
      body.prepend(fragment);
      const visible = Math.min(limit, shown.length);
      $("#count").textContent = visible < shown.length ? `${visible} of ${shown.length} rows` : `${shown.length} rows`;
      $("#more").hidden = visible >= shown.length;
      for (const button of all(".q")) button.setAttribute("aria-pressed", String(button.dataset.q === wanted));
    };
    const reset = () => { limit = page; apply(); };
    for (const input of all("input[name=pick], #filter, #sort")) input.addEventListener("change", reset);
    $("#search").addEventListener("input", reset);
    $("#more").addEventListener("click", () => { limit += page; apply(); });
    for (const button of all(".q")) button.addEventListener("click", () => {
      const filter = $("#filter");
      filter.value = filter.value === button.dataset.q ? "" : button.dataset.q;
      reset();
    });
    window.addEventListener("beforeprint", () => { limit = rows.length; apply(); });
    apply();
  }

  // A policy under the pointer, in any table or figure, stands out in all figures
  const light = (name) => {
    for (const chart of all(".figures .chart")) {
      const marks = all("[data-policy]", chart);
      const found = marks.filter((mark) => name !== null && mark.dataset.policy === name);
      for (const mark of marks) mark.classList.toggle("hover", found.includes(mark));
      chart.classList.toggle("hovering", found.length > 0);
    }
  };
  for (const place of all(".main tr[data-policy], .verdicts li, .figures [data-policy]")) {
    place.addEventListener("mouseenter", () => light(place.dataset.policy));
    place.addEventListener("mouseleave", () => light(null));
  }

  // Copy
  for (const button of all("[data-copy]")) button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch (error) {
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2500);
  });

  // Download. A cell that a spreadsheet would take for a formula is quoted.
  const csvCell = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  for (const button of all("[data-download]")) button.addEventListener("click", () => {
    const { columns, rows } = JSON.parse($("#data").textContent), kind = button.dataset.download;
    const lines = kind === "csv"
      ? [columns, ...rows].map((row) => row.map(csvCell).join(","))
      : rows.map((row) => JSON.stringify(Object.fromEntries(columns.map((key, i) => [key, row[i]]))));
    const url = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: kind === "csv" ? "text/csv" : "application/x-ndjson" }));
    const link = document.createElement("a");
    link.href = url;
    link.download = "samples." + kind;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
})();
