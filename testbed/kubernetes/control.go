package main

import (
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register" // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectlcmd "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

func kubeAPIServer() int         { return cli.Run(apiserver.NewAPIServerCommand()) }
func kubeControllerManager() int { return cli.Run(manager.NewControllerManagerCommand()) }
func kubeScheduler() int         { return cli.Run(scheduler.NewSchedulerCommand()) }

func kubectl() int { return cli.Run(kubectlcmd.NewDefaultKubectlCommand()) }
