"""The demo of timm_dynamic as a Space: `timm-dynamic demo` with the network that ships with the package."""

from timm_dynamic.demo import load_pair, make_app, serve

if __name__ == "__main__":
    serve(make_app(*load_pair()), host="0.0.0.0", port=7860)
