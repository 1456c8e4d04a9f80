package main

import (
	"k8s.io/component-base/cli"

	kubeletcmd "causeway/testbed/kubernetes/kubelet"
)

func kubelet() int { return cli.Run(kubeletcmd.Command()) }
