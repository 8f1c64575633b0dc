// The conversation stays at its end while it grows, until the person scrolls up to read.

const NEAR = 60; // pixels

export class Scroller {
  #box;
  #follows = true;

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
  }

  #look(button) {
    const { scrollHeight, scrollTop, clientHeight } = this.#box;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR;
    button.hidden = this.#follows;
  }
}
