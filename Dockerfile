# The image of configs/kuberay, and one that cluster.yaml can use: Ray's own, and the environment of `make setup`.
#
#   docker build --tag prism-ray:0.1.0 .      then tag and push it where your cluster pulls from
#
# Both say 2.60.0 and Python 3.11 because requirements/gpu.txt does; CUDA 13 is what its torch is built for.
FROM rayproject/ray:2.60.0-py311-cu130

# make; and a C compiler, which Triton and DeepSpeed call when they run.
RUN sudo apt-get update && sudo apt-get install -y --no-install-recommends build-essential \
    && sudo rm -rf /var/lib/apt/lists/*

# WORKDIR alone would make it root's.
RUN mkdir -p /home/ray/prism_ray
WORKDIR /home/ray/prism_ray
ENV PIP_NO_CACHE_DIR=1

# What the environment is made of, before the code, so that a change of code does not install it anew.
COPY --chown=ray:users Makefile pyproject.toml README.md LICENSE ./
COPY --chown=ray:users requirements requirements
COPY --chown=ray:users tools tools
COPY --chown=ray:users prism_ray/__init__.py prism_ray/__init__.py
RUN make setup STACK=gpu LOCKS=requirements/gpu.txt

# Ray starts programs through shells of all kinds, some of which read these files and set PATH themselves.
ENV PATH=/home/ray/prism_ray/.venv/bin:$PATH
RUN echo 'export PATH=/home/ray/prism_ray/.venv/bin:$PATH' | tee -a ~/.bashrc >> ~/.profile

COPY --chown=ray:users prism_ray prism_ray
COPY --chown=ray:users jobs jobs
COPY --chown=ray:users configs configs

# The environment comes first on the path, and holds what was asked for.
RUN python -c "import ray, torch, prism_ray.config.run as run; print(ray.__version__, torch.__version__, run.__file__)"
