package agent

import (
	"causeway/datapath"
	"causeway/identity"
)

// podLinks makes the links between the node and its pods; datapath's functions but in tests.
type podLinks interface {
	Create(ep identity.Endpoint) (datapath.PodLink, error)
	// Find returns a link by its name on the node; false if there is none.
	Find(hostLink string) (datapath.PodLink, bool, error)
	Repair(ep identity.Endpoint) error
	Delete(hostLink string) error
}

type kernelLinks struct{}

func podLinkConfig(ep identity.Endpoint) datapath.PodLinkConfig {
	return datapath.PodLinkConfig{NetNS: ep.NetNS, HostLink: ep.HostLink, Interface: ep.Interface, Address: ep.Address, Address6: ep.Address6, MTU: ep.MTU}
}

func (kernelLinks) Create(ep identity.Endpoint) (datapath.PodLink, error) {
	return datapath.CreatePodLink(podLinkConfig(ep))
}

func (kernelLinks) Find(hostLink string) (datapath.PodLink, bool, error) {
	return datapath.PodLinkExists(hostLink)
}

func (kernelLinks) Repair(ep identity.Endpoint) error {
	return datapath.RepairPodLink(podLinkConfig(ep), ep.MAC)
}

func (kernelLinks) Delete(hostLink string) error { return datapath.DeletePodLink(hostLink) }
