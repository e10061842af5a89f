"""Camera proxies: clusters split by camera, and the memory with an entry for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class CameraProxies:
    """Which image belongs to which proxy, and what each proxy is.

    Parameters
    ----------
    label : LongTensor [N]
        Proxy p(i) of each image, −1 for outliers.
    cluster : LongTensor [P]
        Cluster y(p) of each proxy.
    camera : LongTensor [P]
        Camera c(p), the camid of each proxy.
    """

    label: Tensor
    cluster: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return len(self.cluster)

    @cached_property
    def most_per_cluster(self) -> int:
        """Proxies of the cluster that has most, the most cameras that see one."""
        return int(self.cluster.bincount().max()) if len(self) else 0

    @cached_property
    def camera_entropy(self) -> Tensor:
        """Entropy of each cluster's camera histogram in bits, FloatTensor [C].

        0 for a cluster of one camera; log2 of the cameras where all have equally many
        pictures.
        """
        number = len(self.cluster.bincount())
        size = self.label[self.label >= 0].bincount(minlength=len(self)).float()
        whole = size.new_zeros(number).index_add(0, self.cluster, size)
        share = size / whole[self.cluster]
        return share.new_zeros(number).index_add(0, self.cluster, -share * share.log2())

    def to(self, device: torch.device) -> CameraProxies:
        """Return the same proxies with their tensors on `device`."""
        columns = (self.label, self.cluster, self.camera)
        return CameraProxies(*(column.to(device) for column in columns))


def split_by_camera(clusters: Tensor, camids: Tensor) -> CameraProxies:
    """Split every cluster by camera (paper, Section III-A).

    Parameters
    ----------
    clusters : LongTensor [N]
        Pseudo labels, −1 for outliers.
    camids : LongTensor [N]
        Camera of each image.

    Returns
    -------
    CameraProxies
        Numbered by cluster, then by camera. No proxy is empty.

    Raises
    ------
    IndexError
        When the two columns differ in length.

    Book: :eq:`split_by_camera`
    """
    inside = clusters >= 0
    pairs = torch.stack([clusters[inside], camids[inside]], dim=1)
    proxies, label_inside = pairs.unique(dim=0, return_inverse=True)
    label = torch.full_like(clusters, -1)
    label[inside] = label_inside
    return CameraProxies(label=label, cluster=proxies[:, 0], camera=proxies[:, 1])


def drop_single_camera(clusters: Tensor, camids: Tensor) -> Tensor:
    """Return the clusters with those of one camera made outliers (−1), LongTensor [N].

    Such a cluster has nothing to associate across cameras: in the offline loss it only
    pushes. Labels keep their numbers.

    Parameters
    ----------
    clusters : LongTensor [N]
        Pseudo labels, −1 for outliers.
    camids : LongTensor [N]
        Camera of each image.

    Book: :eq:`drop_single_camera`
    """
    proxies = split_by_camera(clusters, camids)
    seen, cameras = proxies.cluster.unique(return_counts=True)
    return clusters.masked_fill(torch.isin(clusters, seen[cameras == 1]), -1)


def check_cameras(camids: Tensor, n: int) -> None:
    """Refuse what cannot be the cameras of n images.

    Raises
    ------
    ValueError
        For another length, or for numbers that are not whole, or negative.
    """
    if camids.shape != (n,) or camids.is_floating_point() or bool((camids < 0).any()):
        raise ValueError(
            f"camids must be {n} whole numbers from 0 on, one an image; they are "
            f"{camids.dtype} {list(camids.shape)}"
        )


class ProxyMemory(nn.Module):
    """One L2-normalised entry m_p per proxy, following its images' features.

    Parameters
    ----------
    centroids : FloatTensor [P, D]
        The entries at the start; normalised here.
    momentum : float
        Share μ of the old entry that an update keeps.

    Book: :eq:`ProxyMemory`
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, momentum: float = 0.2) -> None:
        super().__init__()
        self.register_buffer("centroids", F.normalize(centroids.float()))
        self.momentum = momentum

    @classmethod
    def from_features(
        cls, features: Tensor, proxies: CameraProxies, momentum: float = 0.2
    ) -> ProxyMemory:
        """Start every entry at the normalised mean of its images' features.

        Parameters
        ----------
        features : FloatTensor [N, D]
            L2-normalised features of all images, outliers included.
        proxies : CameraProxies
            Of the same N images, on the same device.
        momentum : float
            See the class.
        """
        label = proxies.label.to(features.device)
        inside = label >= 0
        sums = features.new_zeros(len(proxies), features.shape[1])
        sums.index_add_(0, label[inside], features[inside])
        return cls(sums, momentum)

    @torch.no_grad()
    def update(self, features: Tensor, proxy: Tensor, together: int = 1) -> None:
        """Move entries towards new features, image by image in batch order.

        m ← μ m + (1 − μ) f, then normalise; images of one proxy compound. Nothing here
        depends on numbers, so a GPU is not waited for.

        Parameters
        ----------
        features : FloatTensor [B, D]
            On the device of the memory.
        proxy : LongTensor [B]
            Proxy of each, on the same device.
        together : int
            How many images of a proxy stand together, where every proxy of the batch
            has that many and stands in one place, as `proxy_batches` draws them: their
            j-th images are handled in one step. With 1, any batch will do.
        """
        steps = together if together > 1 else len(proxy)  # any order: image by image
        for row in (slice(j, None, steps) for j in range(steps)):
            old, new = self.centroids[proxy[row]], features[row].float()
            mixed = F.normalize(self.momentum * old + (1 - self.momentum) * new)
            self.centroids[proxy[row]] = mixed
