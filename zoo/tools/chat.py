"""`zoo chat MODEL --image FILE "question"`: ask a vision-language model once, or talk to it."""

from __future__ import annotations

import argparse

from zoo.errors import ZooError


def cli_chat(argv: list[str]) -> int:
    """Answers one question, or reads questions until an empty line."""
    parser = argparse.ArgumentParser(prog='zoo chat', description='Ask a model about images, or talk to it.')
    parser.add_argument('model', help='folder or hub name that AutoModelForImageTextToText loads')
    parser.add_argument('question', nargs='?', help='without one, questions are read until an empty line')
    parser.add_argument('--image', action='append', default=[], metavar='FILE', help='may be given several times')
    parser.add_argument('--device', help='cuda where there is one, otherwise cpu')
    parser.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16', 'float16'])
    parser.add_argument('--max-new-tokens', type=int, default=512, metavar='N')
    args = parser.parse_intermixed_args(argv)  # the question may follow the options
    from zoo.vlm.chat import chat, load_vlm
    from zoo.vlm.processing import read_image

    images = [read_image(path) for path in args.image]  # before any download
    model, processor = load_vlm(args.model, args.device, args.dtype)
    history: list[tuple[str, str]] = []
    while True:
        try:
            question = args.question or input('> ')
        except EOFError:
            return 0
        if not question.strip():
            return 0
        try:
            said, history = chat(model, processor, question, images, history, max_new_tokens=args.max_new_tokens)
        except ZooError:
            if args.question:
                raise
            print('that question does not fit the images given; every <image> in it needs one')
            continue
        print(said)
        if args.question:
            return 0
