"""Camera proxies: clusters split by camera, and the memory with an entry for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        """Proxies of the cluster that has most: the most cameras that see one."""
        return int(self.cluster.bincount().max()) if len(self) else 0

    def to(self, device: torch.device) -> CameraProxies:
        """Return the same proxies with their tensors on `device`."""
        return replace(
            self,
            label=self.label.to(device),
            cluster=self.cluster.to(device),
            camera=self.camera.to(device),
        )


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
    ValueError
        When the two columns differ in length.

    Book: :eq:`split_by_camera`
    """
    if clusters.shape != camids.shape or clusters.dim() != 1:
        raise ValueError(
            f"clusters and camids must be columns of one length, not "
            f"{list(clusters.shape)} and {list(camids.shape)}"
        )
    inside = clusters >= 0
    pairs = torch.stack([clusters[inside], camids[inside]], dim=1)
    proxies, label_inside = pairs.unique(dim=0, return_inverse=True)
    label = torch.full_like(clusters, -1)
    label[inside] = label_inside
    return CameraProxies(label=label, cluster=proxies[:, 0], camera=proxies[:, 1])


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
    def update(self, features: Tensor, proxy: Tensor) -> None:
        """Move entries towards new features, image by image in batch order.

        m ← μ m + (1 − μ) f, then normalise; images of one proxy compound. Images
        of different proxies do not touch each other, so the j-th image of every
        proxy is handled in one step: as many steps as the most frequent proxy has
        images, not as many as the batch has.

        Parameters
        ----------
        features : FloatTensor [B, D]
            On the device of the memory.
        proxy : LongTensor [B]
            Proxy of each; on the CPU the call waits for no GPU work.
        """
        order = proxy.argsort(stable=True)
        grouped = proxy[order]
        position = torch.arange(len(proxy), device=proxy.device)
        starts = torch.ones_like(grouped, dtype=torch.bool)
        starts[1:] = grouped[1:] != grouped[:-1]
        begin = torch.where(starts, position, 0).cummax(0).values
        turn = torch.empty_like(position)
        turn[order] = position - begin
        for j in range(int(turn.max()) + 1 if len(turn) else 0):
            # Row numbers, since a GPU would be waited for to count a mask.
            now = (turn == j).nonzero().flatten()
            target = proxy[now].to(self.centroids.device, non_blocking=True)
            new = features[now.to(features.device, non_blocking=True)].float()
            mixed = self.momentum * self.centroids[target] + (1 - self.momentum) * new
            self.centroids[target] = F.normalize(mixed)
