// The conversation stays at its end while it grows, until the person scrolls up to read.

const NEAR = 60; // pixels

export class Scroller {
  #box;
  #follows = true;
  #top = 0; // where toEnd left it

  /** content: what grows inside of `box`. button: leads back to the end, and hides there. */
  constructor(box, content, button) {
    this.#box = box;
    box.addEventListener("scroll", () => this.#look(button), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.#follows && this.toEnd()).observe(content);
    new ResizeObserver(() => this.#follows && this.toEnd()).observe(box);
  }

  toEnd() {
    this.#follows = true;
    this.#box.scrollTop = this.#box.scrollHeight;
    this.#top = this.#box.scrollTop;
  }

  #look(button) {
    const { scrollHeight, scrollTop, clientHeight } = this.#box;
    const isNear = scrollHeight - scrollTop - clientHeight < NEAR;
    // Our own scrolling is told late, when more may have grown: only who moves up from there has left the end.
    this.#follows = isNear || (this.#follows && scrollTop > this.#top - 1);
    button.hidden = this.#follows;
  }
}
