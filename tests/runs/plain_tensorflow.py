"""Loads a SavedModel where lmscale cannot be imported, and calls its signatures: prints a line of JSON."""

import json
import sys

sys.modules["lmscale"] = None  # type: ignore[assignment]


def main(path, calls):
    """Calls [(signature, {argument: value})] of the SavedModel at `path`."""
    import tensorflow as tf

    try:
        import lmscale  # noqa: F401
    except ImportError:
        signatures = tf.saved_model.load(path).signatures
        results = []
        for name, arguments in calls:
            found = signatures[name](**{key: tf.constant(value) for key, value in arguments.items()})
            results.append(
                {
                    key: [[word.decode() for word in row] for row in x.numpy().tolist()]
                    if x.dtype == tf.string
                    else x.numpy().tolist()
                    for key, x in found.items()
                }
            )
        print(json.dumps({"signatures": sorted(signatures), "results": results}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
