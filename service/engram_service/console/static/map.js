// The picture of the point under the pointer, beside the map; a click opens its page.
"use strict";

(() => {
  function addresses(map, circle) {
    const group = circle.parentNode;
    const number = circle.dataset.n;
    if (!group.dataset.pack) return { picture: `${map.dataset.originals}/${number}`, said: `original ${number}` };
    const page = `${map.dataset.exemplars}/${group.dataset.pack}/${number}`;
    return { picture: `${page}/picture`, page, said: `row ${number}` };
  }

  document.addEventListener("DOMContentLoaded", () => {
    const map = document.querySelector(".map > svg");
    const picture = document.querySelector(".thumbnail img");
    const caption = document.querySelector(".thumbnail figcaption");
    if (!map) return;
    map.addEventListener("pointerover", (event) => {
      const circle = event.target.closest("circle");
      if (!circle) return;
      const found = addresses(map, circle);
      picture.src = found.picture;
      picture.alt = found.said;
      picture.hidden = false;
      caption.textContent = found.said;
      for (const other of map.querySelectorAll("circle.at")) other.classList.remove("at");
      circle.classList.add("at");
    });
    map.addEventListener("click", (event) => {
      const circle = event.target.closest("circle");
      const found = circle && addresses(map, circle);
      if (found && found.page) location.assign(found.page);
    });
  });
})();
